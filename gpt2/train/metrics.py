"""The visible progress of a run: the bar, metrics.jsonl, and loss.png, drawn from metrics.jsonl."""

import json
import os
import sys
import time
from pathlib import Path
from types import NoneType
from typing import Any

from tqdm import tqdm

from .. import bars, files
from ..checks import check_value
from ..errors import InputError, WriteError, brief, quoted

_LINE_BYTES = 2**16  # limit for a line of metrics.jsonl; a real one has 200
_FIELDS = {  # of a line: types and range
    "step": ((int,), {"at_least": 1}),
    "train_loss": ((float,), {}),
    "val_loss": ((float,), {}),
    "lr": ((float,), {"at_least": 0}),
    "tokens_per_s": ((float, NoneType), {"at_least": 0}),
    "mfu": ((float, NoneType), {"at_least": 0}),
    "elapsed_s": ((float,), {"at_least": 0}),
}


class Progress:
    """The bar on the terminal and the lines of metrics.jsonl.

    A resumed run removes the lines after the step that it resumes from.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,  # done before
        steps: int,
        elapsed_s: float,  # spent before
        tokens_per_step: int,
        flops_per_token: int,
        peak_flops: float | None,  # None: unknown, and mfu is null
    ):
        self.rows = [row for row in read(path) if row["step"] <= step]
        self._path = path
        files.write_atomic(path, "".join(map(_line, self.rows)))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # flushed after every line
        self._began = time.perf_counter() - elapsed_s
        self._tokens_per_step = tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._losses, self._seconds = [], 0.0  # since the last line
        self._bar = bars.bar(total=steps, initial=step, unit="step")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()
        try:
            with files.writing(self._path):
                self._file.close()
        except WriteError:
            if exception[0] is None:
                raise  # otherwise the exception on its way already reports the failed write

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began

    def add(self, loss: float, seconds: float) -> None:
        """Counts one more step, with its loss and duration."""
        self._losses.append(loss)
        self._seconds += seconds
        self._bar.update()

    def line(self, step: int, lr: float, val_loss: float | None = None) -> None:
        """Writes a line: the mean training loss and the speed since the last line. tokens_per_s
        and mfu are null if the clock did not advance."""
        speed = bars.per_second(len(self._losses) * self._tokens_per_step, self._seconds)
        known = speed is not None and self._peak_flops is not None
        mfu = speed * self._flops_per_token / self._peak_flops if known else None
        row = {
            "step": step,
            "train_loss": sum(self._losses) / len(self._losses),
            "val_loss": val_loss,
            "lr": lr,
            "tokens_per_s": speed,
            "mfu": mfu,
            "elapsed_s": self.elapsed_s,
        }
        if val_loss is None:
            del row["val_loss"]
        else:
            tqdm.write(
                f"step {step}: train_loss {row['train_loss']:.4f}, val_loss {val_loss:.4f}",
                file=sys.stderr,
            )
        self.rows.append(row)
        with files.writing(self._path):
            self._file.write(_line(row))
        self._losses, self._seconds = [], 0.0
        self._bar.set_postfix_str(
            f"loss {row['train_loss']:.3f}, lr {lr:.1e}, {bars.shown(speed)} tokens/s, "
            f"mfu {bars.shown(mfu, '.1%')}",
            refresh=False,
        )


def plot(path: Path, rows: list[dict[str, Any]], title: str, unit: str) -> None:
    """Draws the smoothed training loss and the validation loss against the step, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in rows]
    smooth = _smoothed([row["train_loss"] for row in rows])
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["train_loss"] for row in rows], color="C0", alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color="C0", label="training, smoothed")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="C1", markersize=4, label="validation")
        axes.annotate(
            f"{val[-1][1]:.3f}", val[-1], xytext=(0, 8), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def last_step(path: Path) -> int:
    """The step in the last line of metrics.jsonl; 0 if it has none."""
    rows = read(path)
    return rows[-1]["step"] if rows else 0


def _smoothed(values: list[float], keep: float = 0.5) -> list[float]:
    """The exponentially weighted running mean: each value weighs keep times as much as the next."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        smooth.append(total / weight)
    return smooth


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl at path; none if there is no file. A last line that was cut short
    by a kill is dropped. Raises InputError, naming the line, for any other invalid line."""
    if not os.path.lexists(path):
        return []
    rows, number = [], 0
    with files.open_regular(path) as file:
        while line := file.readline(_LINE_BYTES + 1):
            number += 1
            try:
                rows.append(_row(line, rows[-1]["step"] if rows else 0))
            except ValueError as e:  # InputError is one
                if len(line) <= _LINE_BYTES and not line.endswith(b"\n"):
                    break
                raise InputError(f"{quoted(path)}, line {number}: {brief(e)}") from e
    return rows


def _row(line: bytes, before: int) -> dict[str, Any]:
    if len(line) > _LINE_BYTES:
        raise InputError(f"at most {_LINE_BYTES} bytes are read, got more")
    row = files.parse_json(line.decode())
    if not isinstance(row, dict):
        raise InputError(f"an object is expected, got {brief(row)}")
    if unknown := row.keys() - _FIELDS.keys():
        raise InputError(f"unknown field {brief(min(unknown))!r}")
    if missing := {"step", "train_loss"} - row.keys():
        raise InputError(f"{min(missing)} is missing")
    for name, value in row.items():
        check_value(name, value, *_FIELDS[name])
    if row["step"] <= before:
        raise InputError(f"step must be above {before}, that of the line before, got {row['step']}")
    return row
