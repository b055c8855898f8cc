"""What was emulated in a test run, in all its processes: launches, and how much of each kernel's
PTX has been executed. The summary ends with it.

A kernel is a PTX text's: one for each set of template arguments that nvcc compiled, and for each
specialisation that Triton made for the arguments at hand.
"""

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

    def covered(self) -> float:
        """The part that has run, of the instructions that should."""
        missed = self.excluded & ~self.executed
        return self.executed.bit_count() / (self.size - missed.bit_count())


class Emulation:
    def __init__(self):
        self.elsewhere: dict[str, Kernel] = {}

    def add(self, kernels: dict[str, Kernel]) -> None:
        for name, kernel in kernels.items():
            old = self.elsewhere.get(name, kernel._replace(executed=0, launches=0))
            self.elsewhere[name] = kernel._replace(
                executed=kernel.executed | old.executed, launches=kernel.launches + old.launches
            )

    def kernels(self) -> dict[str, Kernel]:
        """By name and hash of the PTX: of this process, and of those whose results were added."""
        if (emulator := sys.modules.get("emulator")) is not None:
            coverage, here = emulator.coverage, {}
            for key, executed in coverage.executed.items():
                excluded = [row[3] is not None for row in coverage.kernels[key]]
                here[" ".join(key)] = Kernel(
                    executed.size, _bits(excluded), _bits(executed), coverage.launches[key]
                )
            self.add(here)
            coverage.clear()
        return self.elsewhere

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
        found = json.loads(node.workeroutput.get("emulation", "{}")) if node.workeroutput else {}
        self.add({name: Kernel(*kernel) for name, kernel in found.items()})

    def pytest_terminal_summary(self, terminalreporter):
        kernels = sorted(self.kernels().items(), key=lambda item: item[1].covered())
        if not kernels:
            return
        launches = sum(kernel.launches for _, kernel in kernels)
        executed = sum(kernel.executed.bit_count() for _, kernel in kernels)
        total = sum(kernel.size for _, kernel in kernels)
        terminalreporter.write_line(
            f"emulated: {launches} launches of {len(kernels)} kernels; "
            f"{executed} of their {total} instructions executed. The least of a kernel's:"
        )
        for name, kernel in kernels[:5]:
            terminalreporter.write_line(f"  {kernel.covered():.1%} of {readable(name)}")


def _bits(flags) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def readable(name: str) -> str:
    """A kernel's name as nvcc has mangled it, without namespaces: decode_kernel<f, 64>."""
    found = re.search(r"\d([a-z_]+_kernel)(?:I(\w+?)EEv)?", name)
    if found is None or not name.startswith("_ZN"):
        return name
    arguments = re.findall(r"L[ilb](\d+)E?|\d+(__\w+?)(?=L|$)|(^f)", found[2] or "")
    return f"{found[1]}<{', '.join(filter(None, (a for group in arguments for a in group)))}>"


emulation = Emulation()
