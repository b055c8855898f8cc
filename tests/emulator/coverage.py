"""Which instructions of which kernels have run, over all launches and, through JSON, processes."""

import collections
import json

import numpy as np


def excluded(ins) -> str | None:
    """Why an instruction may be missed."""
    of_assertion = ins.op in ("trap", "call") or ins.opcode.startswith("st.param")
    return "of an assertion that fails" if of_assertion else None


class Coverage:
    def __init__(self):
        self.executed, self.kernels = {}, {}  # by (kernel name, hash of the PTX)
        self.launches = collections.Counter()
        self.titles = {}  # names for people, where a kernel has several PTX texts

    def of(self, kernel) -> np.ndarray:
        """Where a launch of this kernel notes what it executes."""
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
        """(line, text, source, why it may be missed or None) of what has not run."""
        key = name, ptx_hash
        return [
            row for row, ran in zip(self.kernels[key], self.executed[key], strict=True) if not ran
        ]

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
        """Adds what another process saw."""
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
