.PHONY: test full bench lint build build-cuda wheel sanitize

test:  ## what a user runs
	pytest tests/

full:  ## the whole grid, the AVX-512 kernels over an emulation where the machine has none
	GPT2_TEST_AVX512=1 pytest tests/ --full

bench: OUT = runs/bench
bench:  ## every op, every backend and peer on this machine: runs/bench/report.md
	python benchmarks/run_all.py --out $(OUT)

lint:
	ruff check . && ruff format --check .

build:  ## compiles the CPU kernels ahead of their first use
	python -m gpt2.kernels build

build-cuda:  ## the CUDA kernels: needs nvcc, but no GPU
	python -m gpt2.kernels build --cuda

wheel:  ## for machines without a compiler: dist/ gets a wheel of this platform with the library in it
	rm -rf build kernels/lib
	python -m gpt2.kernels build --out kernels/lib
	python -m pip wheel --no-deps -w dist .
	rm -rf build kernels/lib

# The tests of the CPU kernels with a library that watches its memory and its arithmetic; with GRID=
# a sample of them. Python is not built that way, so the runtimes come first: theirs, and the C++
# library, whose exceptions they intercept.
sanitize: export GPT2_KERNELS_SANITIZE = 1
sanitize: GRID = --full
sanitize: SANITIZED = tests/ -m cpu_kernels $(GRID) --ignore-glob "tests/tools/test_mutants*.py"
sanitize: RUNTIMES = $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(lib)))
sanitize:
	python -m gpt2.kernels build
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		python -m pytest -p no:cacheprovider $(SANITIZED)
