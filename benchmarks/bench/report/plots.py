"""The plots of run_all.py: rate over T for attention, over N for the row kernels, and bars for the
training step. Thick lines are ours."""

from pathlib import Path

from bench.result import label
from bench.result_file import read

# Script -> the extent on the axis, then those that change with it; default: N, rows
AXIS = {"attention": ("T", "B"), "decode_attention": ("T",)}


def draw(folder: Path, paths: list[str]) -> list[Path]:
    """Draws a PNG beside each JSON of results with rates. Host time has no rates."""
    drawn = []
    for path in map(Path, paths):
        document = read(path)
        timed = [r for r in document.get("results", []) if r["median_ms"] and r["rate"]]
        if timed:
            about = document["environment"]
            title = f"{about['device_name']}, torch {about['torch']}, {timed[0]['dtype']}"
            target = folder / f"{path.stem}.png"
            if document["script"] == "train_step":
                bars(timed, target, title)
            else:
                lines(timed, target, title, AXIS.get(document["script"], ("N",)))
            drawn.append(target)
    return drawn


def lines(rows: list[dict], path: Path, title: str, free: tuple[str, ...]) -> None:
    """Draws the rate over the first extent of `free`, a panel per operation and pass."""
    plt, x = pyplot(), free[0]
    panels = list(dict.fromkeys((r["op"], r["step"]) for r in rows))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    contenders = dict.fromkeys(r["contender"] for r in rows)
    colours = {name: f"C{i % 10}" for i, name in enumerate(contenders)}
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = sweep([r for r in rows if (r["op"], r["step"]) == panel], free)
        for name in dict.fromkeys(r["contender"] for r in mine):
            curve = sorted((r["shape"][x], r["rate"]) for r in mine if r["contender"] == name)
            ours = any(r["kind"] == "backend" for r in mine if r["contender"] == name)
            axis.plot(*zip(*curve, strict=True), marker="o", label=name, color=colours[name],
                      linewidth=3 if ours else 1)  # fmt: skip
        axis.set_title(", ".join(panel))
        axis.set_xscale("log", base=2)
        ticks = sorted({r["shape"][x] for r in mine})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xlabel(x)
        axis.set_ylabel(mine[0]["unit"])
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sweep(rows: list[dict], free: tuple[str, ...]) -> list[dict]:
    """The rows with the most frequent values of the extents that are not free, for one curve."""

    def rest(row):
        return tuple((k, v) for k, v in row["shape"].items() if k not in free)

    counts = [rest(row) for row in rows]
    commonest = max(dict.fromkeys(counts), key=counts.count)
    return [row for row in rows if rest(row) == commonest]


def bars(rows: list[dict], path: Path, title: str) -> None:
    """Draws tokens per second of a training step, a panel per shape."""
    plt = pyplot()
    shapes = list(dict.fromkeys(label(r["shape"]) for r in rows))
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(6 * len(shapes), 4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        mine = [r for r in rows if label(r["shape"]) == shape]
        mine.sort(key=lambda r: -r["median_ms"])
        speeds = [r["shape"]["B"] * r["shape"]["T"] / r["median_ms"] * 1e3 for r in mine]
        colours = ["C0" if r["kind"] == "backend" else "0.7" for r in mine]
        axis.bar_label(axis.barh([r["contender"] for r in mine], speeds, color=colours), fmt="%.0f")
        axis.set_xlabel("tokens/s")
        axis.set_title(f"train_step, {shape}")
        axis.margins(x=0.15)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
