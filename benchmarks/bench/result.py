"""A result, tables of results for the terminal, and a plot."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Result:
    """One row of the table and of the JSON. `reason` explains a missing time."""

    op: str
    step: str
    shape: dict
    dtype: str
    contender: str
    kind: str
    status: str = "ok"  # ok, unavailable, wrong, error, skipped
    reason: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rate: float | None = None
    unit: str | None = None
    percent_of_limit: float | None = None
    times_faster_than: dict = field(default_factory=dict)  # peer -> ratio
    max_error: float | None = None
    peak_memory_bytes: int | None = None  # beyond the inputs, saved tensors included
    details: dict = field(default_factory=dict)  # of a training step: tokens/s, profile


def is_ours(row: dict) -> bool:
    """Whether our kernels computed the row; the reference is plain PyTorch."""
    return row["kind"] == "backend" and row["contender"] != "reference"


def show(results: list[Result]) -> str:
    """One table per operation, pass, shape and dtype."""
    blocks = []
    for _, group in itertools.groupby(results, key=lambda r: (r.op, r.step)):
        group = list(group)
        first = group[0]
        best = min((r.median_ms for r in group if r.kind == "peer" and r.median_ms), default=None)
        lines = [f"{first.op} {first.step}, {label(first.shape)}, {first.dtype}"]
        lines.append(
            f"  {'':24}{'median ms':>10}{'20-80 %':>18}{first_unit(group):>10}{'of limit':>9}"
            f"{'vs peer':>8}{'max error':>10}{'peak MiB':>9}"
        )
        for r in group:
            name = f"{'*' if r.kind == 'backend' else ' '} {r.contender}"
            if r.median_ms is None:
                lines.append(f"{name:26}{r.status}: {r.reason}")
                continue
            memory = "-" if r.peak_memory_bytes is None else f"{r.peak_memory_bytes / 2**20:.0f}"
            versus = f"{best / r.median_ms:.2f}x" if best else "-"
            lines.append(
                f"{name:26}{r.median_ms:10.3f}{f'{r.p20_ms:.3f}-{r.p80_ms:.3f}':>18}"
                f"{significant(r.rate):>10}{r.percent_of_limit:8.1f}%{versus:>8}"
                f"{r.max_error:10.1e}{memory:>9}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def first_unit(group):
    return next((r.unit for r in group if r.unit), "")


def significant(x: float) -> str:
    """x with three significant digits, without an exponent."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else "0"


def label(shape: dict) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def plot(results: list[Result], path: Path, title: str) -> None:
    """Draws the rate over shapes, a panel per operation and pass. Thick lines are ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [r for r in results if r.median_ms]
    colours = {r.contender: f"C{i}" for i, r in enumerate({r.contender: r for r in timed}.values())}
    panels = list(dict.fromkeys((r.op, r.step, r.dtype) for r in timed))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        rows = [r for r in timed if (r.op, r.step, r.dtype) == panel]
        shapes = list(dict.fromkeys(label(r.shape) for r in rows))
        for name in dict.fromkeys(r.contender for r in rows):
            mine = [r for r in rows if r.contender == name]
            axis.plot(
                [shapes.index(label(r.shape)) for r in mine],
                [r.rate for r in mine],
                marker="o",
                label=name,
                color=colours[name],
                linewidth=3 if mine[0].kind == "backend" else 1,
            )
        axis.set_title(", ".join(panel))
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=8)
        axis.set_ylabel(rows[0].unit)
        axis.set_ylim(0, 1.1 * max(r.rate for r in rows))
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
