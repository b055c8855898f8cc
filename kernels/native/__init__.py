"""The libraries of csrc: built at their first use, cached, and loaded.

cpu.py, cuda.py    the backends: which calls a library supports, and why not others
libraries.py       finds, builds and loads a library
compiler.py        runs ninja; recipes.py: sources and flags; cuda_toolkit.py: finds nvcc;
                   build_log.py: the errors of a build
build_cache.py     the folder of built libraries; trust.py: checks that nobody else can write to it
"""
