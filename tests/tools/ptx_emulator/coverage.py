"""Records which instructions of which kernels have run, over all launches and (through JSON)
processes."""

import collections
import json

import numpy as np


def excluded(ins) -> str | None:
    """Why an instruction may be missed."""
    of_assertion = ins.op in ("trap", "call") or ins.opcode.startswith("st.param")
    return "of an assertion that fails" if of_assertion else None


def _access(row) -> tuple[str, str] | None:
    """(source line, opcode) of a masked load or store of a Triton kernel; None for others."""
    _, text, source, _ = row
    mask, _, access = text.partition(" ")
    opcode = access.partition(" ")[0]
    masked = mask.startswith("@") and opcode.startswith(("ld.global", "st.global"))
    return (source, opcode) if masked and ".py:" in (source or "") else None


class Coverage:
    def __init__(self):
        self.executed, self.kernels = {}, {}  # by (kernel name, hash of the PTX)
        self.launches = collections.Counter()
        self.titles = {}  # readable names for kernels with several PTX texts

    def of(self, kernel) -> np.ndarray:
        """The array in which a launch of this kernel records its executed instructions."""
        key = kernel.name, kernel.module.hash
        self.launches[key] += 1
        if key not in self.executed:
            self.executed[key] = np.zeros(len(kernel.instructions), np.bool_)
        if key not in self.kernels:
            self.kernels[key] = [
                (i.line, i.text, i.source, excluded(i)) for i in kernel.instructions
            ]
        return self.executed[key]

    def missed(self, name, ptx_hash):
        """(line, text, source, reason or None) of instructions that have not run; the reason is why
        they may be missed."""
        key = name, ptx_hash
        rows = zip(self.kernels[key], self.executed[key], self.excused(key), strict=True)
        return [(*row[:3], why) for row, ran, why in rows if not ran]

    def excused(self, key) -> list[str | None]:
        """By instruction, the reason why it may be missed, or None.

        Triton unrolls an access to a row over its block. If the row is much shorter than the block,
        as 257 elements in 512 lanes, some copies are masked in every lane. They may be missed once
        another copy has run."""
        rows, executed = self.kernels[key], self.executed[key]
        ran = {_access(row) for row, ran in zip(rows, executed, strict=True) if ran} - {None}
        why = "masked in every lane, and another copy ran"
        return [row[3] or (why if _access(row) in ran else None) for row in rows]

    def report(self) -> str:
        lines = []
        for name, ptx_hash in sorted(self.executed):
            executed, missed = self.executed[name, ptx_hash], self.missed(name, ptx_hash)
            excluded = [row for row in missed if row[3]]
            lines.append(
                f"{name} {ptx_hash}: {int(executed.sum())} of {executed.size} instructions"
                + (f", {len(excluded)} excluded" if excluded else "")
            )
            lines += [
                f"    line {line} {source}: {text}" + (f" (excluded: {why})" if why else "")
                for line, text, source, why in missed
            ]
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps([
            {"kernel": name, "hash": h, "instructions": self.kernels[name, h],
             "executed": np.flatnonzero(executed).tolist()}
            for (name, h), executed in self.executed.items()
        ])  # fmt: skip

    def merge(self, text: str):
        """Adds another process's record."""
        for entry in json.loads(text):
            key = entry["kernel"], entry["hash"]
            self.kernels[key] = [tuple(row) for row in entry["instructions"]]
            executed = self.executed.setdefault(key, np.zeros(len(self.kernels[key]), np.bool_))
            executed[entry["executed"]] = True

    def clear(self):
        self.launches.clear()
        self.executed.clear()
        self.kernels.clear()


coverage = Coverage()
