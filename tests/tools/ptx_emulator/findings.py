"""Findings: the instruction, the thread, and the undefined behaviour."""

import dataclasses


class UnsupportedPTX(Exception):
    """PTX that the emulator does not support. Raised before a kernel runs; nothing is skipped."""


@dataclasses.dataclass(frozen=True)
class Finding:
    kind: str  # "bounds", "uninitialized", "race", "barrier", "alignment", "async", "trap", "hang"
    what: str
    kernel: str
    line: int  # of the PTX text
    text: str  # of the instruction
    source: str  # "attention.py:69", from .loc; "" if the PTX has none
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    threads: int  # the number of threads with this finding at that instruction

    def __str__(self):
        others = f" and {self.threads - 1} more" if self.threads > 1 else ""
        source = f", {self.source}" if self.source else ""
        return (
            f"[{self.kind}] {self.kernel}, block {self.block}, thread {self.thread}{others}: "
            f"{self.what}\n    PTX line {self.line}{source}: {self.text}"
        )


class Findings(Exception):
    """A launch broke a rule; it stopped at the first such instruction."""

    def __init__(self, findings: list[Finding]):
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings
