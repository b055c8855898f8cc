"""What a check reports: the instruction, the thread, and what PTX leaves undefined there."""

import dataclasses


class UnsupportedPTX(Exception):
    """PTX that the emulator does not know; raised before a kernel runs, never skipped."""


@dataclasses.dataclass(frozen=True)
class Finding:
    kind: str  # "bounds", "uninitialised", "race", "barrier", "alignment", "async", "trap", "hang"
    what: str
    kernel: str
    line: int  # of the PTX text
    text: str  # of the instruction
    source: str  # "attention.py:69", from .loc; empty where the PTX has none
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    threads: int  # how many threads did it at that instruction

    def __str__(self):
        others = f" and {self.threads - 1} more" if self.threads > 1 else ""
        source = f", {self.source}" if self.source else ""
        return (
            f"[{self.kind}] {self.kernel}, block {self.block}, thread {self.thread}{others}: "
            f"{self.what}\n    PTX line {self.line}{source}: {self.text}"
        )


class Findings(Exception):
    """A launch that broke a rule; it stopped at the first instruction that did."""

    def __init__(self, findings: list[Finding]):
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings
