"""python -m gpt2.kernels: which backend serves each op here, and why the others do not."""

from . import report

print(report())
