"""The JSON file of a running script. It is rewritten after every contender, so that a signal, a
hang or a lost CUDA context loses only the contender that was running.

    {"schema": 1, "script": ..., "environment": ..., "limits": {dtype: ...}, "results": [...],
     "running": {"op", "shape", "dtype", "steps", "contenders"}}     # while something runs

A process that died is restarted with --resume, and skips the cases in its file. Before the restart
blame() records what was running as results without a time, with the reason.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.result import Result, label

SCHEMA = 1


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype; steps are the passes that are timed."""

    op: str
    shape: dict
    dtype: str
    steps: tuple[str, ...]

    def holds(self, result: Result) -> bool:
        return (result.op, result.shape, result.dtype) == (self.op, self.shape, self.dtype)


class Record:
    """The results of one script, in memory and in its file if there is one.

    only: kind of contender -> wanted names, None for all. without: unwanted names. seconds: start
    no new contender after this time. resume: keep the results that an earlier process left in the
    file. rehearsal: contenders that compile run once, untimed, and nothing is recorded.
    """

    def __init__(self, path: Path | None, script: str, environment: dict, *, only: dict,
                 without: tuple[str, ...] = (), seconds: float | None = None, resume: bool = False,
                 rehearsal: bool = False):  # fmt: skip
        self.path, self.only, self.without, self.rehearsal = path, only, without, rehearsal
        self.deadline = None if seconds is None else time.monotonic() + seconds
        old = read(path) if resume else {}
        self.head = {"schema": SCHEMA, "script": script, "environment": environment}
        self.limits = old.get("limits", {})
        self.results = [Result(**row) for row in old.get("results", [])]

    def wanted(self, case: Case, contenders: list) -> list:
        """The requested contenders that have no result yet."""
        mine = [r for r in self.results if case.holds(r)]
        done = {
            name
            for name in {r.contender for r in mine}
            if {r.step for r in mine if r.contender == name} >= set(case.steps)
        }
        return [
            c for c in contenders
            if c.name not in done and c.name not in self.without
            and (self.only[c.kind] is None or c.name in self.only[c.kind])
        ]  # fmt: skip

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def begin(self, case: Case, contenders: list, steps: tuple[str, ...]) -> None:
        running = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "steps": steps}
        self._write(running | {"contenders": [[c.name, c.kind] for c in contenders]})

    def add(self, *results: Result) -> None:
        self.results += results
        self._write()

    def settle(self, case: Case) -> list[Result]:
        """The results of a finished case, by pass, the fastest first."""
        mine = [r for r in self.results if case.holds(r)]
        mine.sort(key=lambda r: (case.steps.index(r.step), r.median_ms or float("inf")))
        self.results = [r for r in self.results if not case.holds(r)] + mine
        self._write()
        return mine

    def _write(self, running: dict | None = None) -> None:
        if self.path is None or self.rehearsal:
            return
        rows = [asdict(r) for r in self.results]
        document = self.head | {"limits": self.limits, "results": rows}
        write(self.path, document | ({"running": running} if running else {}))


def compare(results: list[Result]) -> None:
    """Sets times_faster_than of the results of one pass."""
    peers = {r.contender: r.median_ms for r in results if r.kind == "peer" and r.median_ms}
    for r in results:
        if r.median_ms:
            r.times_faster_than = {name: ms / r.median_ms for name, ms in peers.items()}


def read(path: Path | None) -> dict:
    """The document in the file; {} if there is none or it cannot be read."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, AttributeError):
        return {}
    return document if isinstance(document, dict) and document.get("schema") == SCHEMA else {}


def write(path: Path, document: dict) -> None:
    """Writes the document atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def line(row: dict) -> str:
    """A line of text for a result without a time, with its reason."""
    return f"{row['contender']} {row['op']} {label(row['shape'])} {row['dtype']}: {row['reason']}"


def blame(path: Path, status: Callable[[str], tuple[str, str]]) -> list[str]:
    """Adds results without a time for what was running when the file's process ended. Returns a
    line of text for each. status(kind) -> (status, reason)."""
    document = read(path)
    running = document.pop("running", None)
    if not running:
        return []
    case = Case(running["op"], running["shape"], running["dtype"], tuple(running["steps"]))
    rows, lines = [Result(**row) for row in document["results"]], []
    for name, kind in running["contenders"]:
        state, reason = status(kind)
        measured = {r.step for r in rows if case.holds(r) and r.contender == name}
        for step in case.steps:
            if step not in measured:
                rows.append(Result(case.op, step, case.shape, case.dtype, name, kind,
                                   status=state, reason=reason))  # fmt: skip
        lines.append(line(asdict(rows[-1])))
    write(path, document | {"results": [asdict(r) for r in rows]})
    return lines
