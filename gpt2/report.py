"""What there is to see of a run: the bar, metrics.jsonl, and loss.png, which is drawn from it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import bars, files


class Progress:
    """The bar on the terminal and the lines of metrics.jsonl.

    A run that goes on from a step forgets the lines that came after it.
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
        peak_flops: float,
    ):
        self.rows = [row for row in _read(path) if row["step"] <= step]
        files.write_atomic(path, "".join(map(_line, self.rows)))
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time
        self._began = time.perf_counter() - elapsed_s
        self._tokens_per_step = tokens_per_step
        self._mfu_per_speed = flops_per_token / peak_flops
        self._losses, self._seconds = [], 0.0  # of the steps since the last line
        self._bar = bars.bar(total=steps, initial=step, unit="step")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()
        self._file.close()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began

    def add(self, loss: float, seconds: float) -> None:
        """One more step is done."""
        self._losses.append(loss)
        self._seconds += seconds
        self._bar.update()

    def line(self, step: int, lr: float, val_loss: float | None = None) -> None:
        """Writes a line: the mean loss and the speed of training since the last one."""
        speed = len(self._losses) * self._tokens_per_step / self._seconds
        row = {
            "step": step,
            "train_loss": sum(self._losses) / len(self._losses),
            "val_loss": val_loss,
            "lr": lr,
            "tokens_per_s": speed,
            "mfu": speed * self._mfu_per_speed,
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
        self._file.write(_line(row))
        self._losses, self._seconds = [], 0.0
        self._bar.set_postfix_str(
            f"loss {row['train_loss']:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s, "
            f"mfu {row['mfu']:.1%}",
            refresh=False,
        )


def plot(path: Path, rows: list[dict[str, Any]], title: str, unit: str) -> None:
    """Draws the training loss, smoothed, and the validation loss over the steps."""
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
    """The step of the last line of metrics.jsonl; 0 without one."""
    rows = _read(path)
    return rows[-1]["step"] if rows else 0


def _smoothed(values: list[float], keep: float = 0.5) -> list[float]:
    """The running mean that forgets: each value has keep times the weight of the one after it."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        smooth.append(total / weight)
    return smooth


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of path, up to one that a kill cut short."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = files.parse_json(line.decode())
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            break
    return rows
