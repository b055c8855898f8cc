"""Runs PTX on numpy, thread by thread, and reports undefined behaviour: docs/emulator.md.

findings.py the findings of the checks
parser.py      PTX text                              syntax.py   its parts
registers.py   operands as numpy arrays, modifiers, the table of instructions
flow.py        straight runs of instructions, and registers that a path leaves unset
launch.py      sizes, parameters, chunks of blocks   threads.py  threads, divergence, barriers
memory.py      global, constant and local memory     shared.py   shared memory and its races
coverage.py    which instructions have run           snippet.py  a few lines of PTX as a kernel

integers.py floats.py rounding.py convert.py compare.py access.py control.py warp.py tensor.py:
the instructions

triton_device.py runs Triton's launches here
cuda_device.py and device.cpp run the launches of nvcc's host code
"""

from .coverage import coverage
from .findings import Finding, Findings, UnsupportedPTX
from .launch import launch
from .memory import CANARY, Memory
from .parser import Module

__all__ = [
    "CANARY",
    "Finding",
    "Findings",
    "Memory",
    "Module",
    "UnsupportedPTX",
    "coverage",
    "launch",
]
