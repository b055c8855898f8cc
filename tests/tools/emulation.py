"""Records what a test run emulated, in all its processes: launches, and the share of each kernel's
PTX that was executed. The summary prints it last.

For CUDA C++ a kernel is a set of template arguments, for Triton a set of types and constants.
Triton also specialises for arguments that are 1 or multiples of 16. Of these variants the one with
the highest coverage counts, because few of them reach every tail.
"""

import collections
import json
import os
import re
import sys
from typing import NamedTuple

import pytest

FILE = "GPT2_TEST_EMULATION"  # file into which a child process of a test writes its record


class Kernel(NamedTuple):
    size: int  # instructions
    excluded: int  # bits: instructions that may be missed
    executed: int  # bits: instructions that have run
    launches: int

    def counts(self) -> tuple[int, int]:
        """(instructions that have run, instructions that should run)."""
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
        """Kernels by name and hash of the PTX, of this process and of the processes whose results
        were added."""
        if (emulator := sys.modules.get("ptx_emulator")) is not None:
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
        """kernel -> share of its instructions that have run."""
        found = collections.Counter()
        for name, kernel in self.kernels().items():
            executed, size = kernel.counts()
            kernel_name = name.partition(" ")[0]
            found[kernel_name] = max(found[kernel_name], executed / size)
        return found

    def add_file(self, path) -> None:
        with open(path) as file:
            self.add({name: Kernel(*kernel) for name, kernel in json.load(file).items()})

    # Hooks of pytest and pytest-xdist

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
            f"{executed} of {total} instructions executed"
        )
        least = min(covered, key=covered.get)
        terminalreporter.write_line(f"  least: {covered[least]:.1%} of {readable(least)}")


def _bits(flags) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def readable(name: str) -> str:
    """A kernel's mangled name, shortened and without namespaces: gelu_fwd_kernel<f, 4>."""
    found = re.search(r"\d([a-z_]+_kernel)(?:I(\w+?)EEv)?", name)
    if found is None or not name.startswith("_ZN"):
        return name
    # Integers; 16-bit types, also as substitutions; float first, or after a 16-bit type
    pattern = r"L[ilb](\d+)E?|\d+(__nv_bfloat16|__half)(?:S\d*_)?|((?:(?<=16)|(?<=half)|^)f)"
    arguments = re.findall(pattern, found[2] or "")
    return f"{found[1]}<{', '.join(filter(None, (a for group in arguments for a in group)))}>"


emulation = Emulation()
