"""What was emulated in a test run, in all its processes: launches, and how much of each kernel's
PTX has been executed. The summary ends with it.

A kernel is one for each set of template arguments that nvcc compiled; of Triton's, one for each set
of types and constants. Triton specialises it further, for arguments that are 1 or multiples of 16:
of these texts the one counts that has been covered best, as few of them meet every tail.
"""

import collections
import json
import os
import re
import sys
from typing import NamedTuple

import pytest

FILE = "GPT2_TEST_EMULATION"  # where a process that a test starts leaves what it saw


class Kernel(NamedTuple):
    size: int  # instructions
    excluded: int  # bits: those that may be missed
    executed: int  # bits: those that have run
    launches: int

    def counts(self) -> tuple[int, int]:
        """How many instructions have run, of those that should."""
        missed = self.excluded & ~self.executed
        return self.executed.bit_count(), self.size - missed.bit_count()


class Emulation:
    def __init__(self):
        self.elsewhere: dict[str, Kernel] = {}

    def add(self, kernels: dict[str, Kernel]) -> None:
        for name, kernel in kernels.items():
            old = self.elsewhere.get(name, kernel._replace(executed=0, launches=0))
            self.elsewhere[name] = kernel._replace(
                excluded=kernel.excluded | old.excluded, executed=kernel.executed | old.executed,
                launches=kernel.launches + old.launches,
            )  # fmt: skip

    def kernels(self) -> dict[str, Kernel]:
        """By name and hash of the PTX: of this process, and of those whose results were added."""
        if (emulator := sys.modules.get("emulator")) is not None:
            coverage, here = emulator.coverage, {}
            for key, executed in coverage.executed.items():
                excluded = [why is not None for why in coverage.excused(key)]
                title = coverage.titles.get(key, key[0])
                here[f"{title} {key[1]}"] = Kernel(
                    executed.size, _bits(excluded), _bits(executed), coverage.launches[key]
                )
            self.add(here)
            coverage.clear()
        return self.elsewhere

    def covered(self) -> dict[str, float]:
        """By kernel, the part of its instructions that has run."""
        found = collections.Counter()
        for name, kernel in self.kernels().items():
            executed, size = kernel.counts()
            kernel_name = name.partition(" ")[0]
            found[kernel_name] = max(found[kernel_name], executed / size)
        return found

    def add_file(self, path) -> None:
        with open(path) as file:
            self.add({name: Kernel(*kernel) for name, kernel in json.load(file).items()})

    # Hooks of pytest and of pytest-xdist

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["emulation"] = json.dumps(self.kernels())
        elif path := os.environ.get(FILE):
            with open(path, "w") as file:
                json.dump(self.kernels(), file)

    @pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
    def pytest_testnodedown(self, node):
        output = getattr(node, "workeroutput", {})  # a worker that crashed has none
        found = json.loads(output.get("emulation", "{}"))
        self.add({name: Kernel(*kernel) for name, kernel in found.items()})

    def pytest_terminal_summary(self, terminalreporter):
        texts, covered = self.kernels().values(), self.covered()
        if not texts:
            return
        launches = sum(kernel.launches for kernel in texts)
        executed, total = map(sum, zip(*(kernel.counts() for kernel in texts), strict=True))
        terminalreporter.write_line(
            f"emulated: {launches} launches of {len(covered)} kernels in {len(texts)} PTX texts; "
            f"{executed} of {total} instructions executed. The least of a kernel's:"
        )
        for name in sorted(covered, key=covered.get)[:5]:
            terminalreporter.write_line(f"  {covered[name]:.1%} of {readable(name)}")


def _bits(flags) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def readable(name: str) -> str:
    """A kernel's name as nvcc has mangled it, without namespaces: gelu_fwd_kernel<f, 4>."""
    found = re.search(r"\d([a-z_]+_kernel)(?:I(\w+?)EEv)?", name)
    if found is None or not name.startswith("_ZN"):
        return name
    # Integers; 16-bit types, the same again left out; float first, or after one of 16 bits
    pattern = r"L[ilb](\d+)E?|\d+(__nv_bfloat16|__half)(?:S\d*_)?|((?:(?<=16)|(?<=half)|^)f)"
    arguments = re.findall(pattern, found[2] or "")
    return f"{found[1]}<{', '.join(filter(None, (a for group in arguments for a in group)))}>"


emulation = Emulation()
