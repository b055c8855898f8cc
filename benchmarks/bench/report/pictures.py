"""README's pictures, drawn as SVG from the scripts' results.

attention    TFLOP/s of the forward and the backward over T; the limit is the rate of a large matrix
             product in the same run
train_step   tokens/s of a training step of GPT-2 124M, a group of bars per batch size

A picture shows one result file of a GPU: the newest among those with the most shapes. Without such
a file there is no picture.
A picture is two files with transparent backgrounds, for light and for dark pages. Each file holds a
digest of its data and of this script; a picture is out of date only if the digest differs, because
versions of matplotlib write different bytes. matplotlib is imported only to draw.
"""

import hashlib
import html
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.result import is_ours, label

FOLDER = "docs/pictures"
# File name suffix -> colours; paper is the page's colour, which fills hollow marks
THEMES = {
    "": {"ink": "#1f2328", "peer": "#6e7781", "grid": "#d1d9e0", "ours": "#0969da",
         "paper": "#ffffff", "bar": "#b6bec7"},
    "-dark": {"ink": "#f0f6fc", "peer": "#9aa4af", "grid": "#30363d", "ours": "#4493f8",
              "paper": "#0d1117", "bar": "#4b535d"},
}  # fmt: skip
NAMES = {
    "triton": "ours (Triton)", "cuda": "ours (CUDA)", "fast": "ours",
    "fast-graph": "ours (one CUDA graph)", "fast-compiled": "ours (torch.compile)",
    "fast-reduce-overhead": "ours (compile + graphs)",
    "flash-2": "FlashAttention-2", "flash-3": "FlashAttention-3", "flash-4": "FlashAttention-4",
    "flash-4-deterministic": "FA-4 deterministic", "flex": "FlexAttention",
    "sdpa-cudnn": "SDPA cuDNN", "sdpa-flash": "SDPA flash", "sdpa-efficient": "SDPA efficient",
    "sdpa-math": "SDPA math", "eager": "eager", "compiled": "torch.compile",
    "reduce-overhead": "torch.compile + graphs", "max-autotune": "torch.compile, tuned",
    "plain": "plain PyTorch", "nanogpt": "nanoGPT's form",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """The data of one picture, its description in words, and the function that draws it."""

    name: str  # file name without theme and suffix
    data: dict
    words: str  # alternative text
    draw: Callable  # (data, colours) -> matplotlib's figure

    def paths(self, root: Path) -> dict[str, Path]:
        return {theme: root / FOLDER / f"{self.name}{theme}.svg" for theme in THEMES}

    def __str__(self) -> str:
        return f"{FOLDER}/{self.name}.svg"

    def digest(self) -> str:
        shown = json.dumps([self.data, self.words], sort_keys=True).encode()
        return hashlib.sha256(shown + Path(__file__).read_bytes()).hexdigest()[:16]

    def stale(self, root: Path) -> bool:
        """True if a file is missing, or was drawn from other data or by another script."""
        drawn = (p.read_text() if p.is_file() else "" for p in self.paths(root).values())
        digests = [re.search(r"digest ([0-9a-f]{16})", text) for text in drawn]
        return any(found is None or found[1] != self.digest() for found in digests)

    def write(self, root: Path) -> None:
        import matplotlib

        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        about = {"Title": self.words, "Description": f"digest {self.digest()}"}
        about |= {"Date": None, "Creator": None}  # for identical bytes at every draw
        for theme, path in self.paths(root).items():
            with matplotlib.rc_context(settings(THEMES[theme])):
                figure = self.draw(self.data, THEMES[theme])
                figure.savefig(path, format="svg", transparent=True, metadata=about)

    def markup(self) -> str:
        """HTML that shows the picture in the reader's theme on GitHub."""
        light, dark = (f"{FOLDER}/{self.name}{theme}.svg" for theme in THEMES)
        return (
            f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
            f'<img src="{light}" alt="{html.escape(self.words)}">\n</picture>'
        )


def settings(colours: dict) -> dict:
    """matplotlib's settings: text is kept as text, and ids are the same in every run."""
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor",
             "ytick.labelcolor")  # fmt: skip
    lined = "axes.edgecolor", "xtick.color", "ytick.color"
    return {
        "svg.fonttype": "none", "svg.hashsalt": "gpt2-kernels",
        "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        **dict.fromkeys(inked, colours["ink"]), **dict.fromkeys(lined, colours["peer"]),
    }  # fmt: skip


def pictures(documents: list[dict]) -> list[Picture]:
    """All pictures for which there are results of a GPU."""
    made = attention(documents), train_step(documents)
    return [picture for picture in made if picture is not None]


def attention(documents: list[dict]) -> Picture | None:
    """Attention with GPT-2 124M's heads; the largest batch for each T."""
    found = newest(documents, "causal_attention", lambda s: (s["H"], s["D"]) == (12, 64))
    if found is None:
        return None
    document, rows = found
    batches = {}  # T -> B
    for B, T in ((r["shape"]["B"], r["shape"]["T"]) for r in rows):
        batches[T] = max(B, batches.get(T, 0))
    passes = {}
    for row in sorted(rows, key=lambda r: r["shape"]["T"]):
        B, T = row["shape"]["B"], row["shape"]["T"]
        if batches[T] == B:
            lines = passes.setdefault(row["step"], {})
            line = lines.setdefault(row["contender"], {"ours": is_ours(row), "points": []})
            line["points"].append((T, round(row["rate"], 1)))
    data = about(document) | {
        "limit": round(document["limits"]["bfloat16"]["TFLOP/s"]),
        "tokens": sorted({B * T for T, B in batches.items()}),
        "passes": {step: passes[step] for step in ("forward", "backward") if step in passes},
    }
    longest = max(batches)
    ends = []
    for step, lines in data["passes"].items():
        rates = [(dict(line["points"]).get(longest), name) for name, line in lines.items()]
        ranked = sorted((pair for pair in rates if pair[0]), reverse=True)
        ends.append(f"{step.capitalize()}: {listed(ranked)}.")
    words = (
        f"Causal attention on {data['device']}, TFLOP/s over T. At T={longest}: {' '.join(ends)} "
        f"A large matrix product reaches {data['limit']}."
    )
    return Picture("attention", data, words, draw_attention)


def train_step(documents: list[dict]) -> Picture | None:
    found = newest(documents, "train_step", lambda s: s["T"] == 1024)
    if found is None:
        return None
    document, rows = found
    batches = {}  # "B" -> bars, the fastest first
    for row in sorted(rows, key=lambda r: (r["shape"]["B"], r["median_ms"])):
        speed = row["shape"]["B"] * row["shape"]["T"] / row["median_ms"] * 1e3
        bars = batches.setdefault(str(row["shape"]["B"]), [])
        bars.append((round(speed, -2), row["contender"], is_ours(row)))
    data = about(document) | {"batches": batches}
    sizes = (f"B={B}: {listed([bar[:2] for bar in bars])}." for B, bars in batches.items())
    words = (
        f"Tokens per second of a training step of GPT-2 124M on {data['device']}. {' '.join(sizes)}"
    )
    return Picture("train_step", data, words, draw_train_step)


def newest(documents: list[dict], op: str, wanted: Callable) -> tuple[dict, list[dict]] | None:
    """A GPU's document and its timed rows for the wanted shapes of the operation in bfloat16: the
    newest document among those with the most such shapes, so that an interrupted run does not
    replace a complete one. The reference is left out: it is one of the peers, chosen by PyTorch."""
    found = []
    for document in documents:
        if document["environment"].get("device") == "cuda":
            rows = [
                r for r in document["results"]
                if (r["op"], r["dtype"], r["status"]) == (op, "bfloat16", "ok")
                and r["contender"] != "reference" and wanted(r["shape"])
            ]  # fmt: skip
            found += [(document, rows)] if rows else []

    def rank(pair):
        document, rows = pair
        return len({label(r["shape"]) for r in rows}), document["environment"]["date"]

    return max(found, key=rank, default=None)


def about(document: dict) -> dict:
    about = document["environment"]
    commit = f"commit {about['commit']}{', changed' if about['dirty'] else ''}"
    versions = f"torch {about['torch']}, Triton {about['triton']}"
    line = f"{about['device_name']}, {versions}, {commit}, {about['date'][:10]}"
    return {"device": about["device_name"], "line": line}


def listed(pairs: list[tuple[float, str]]) -> str:
    return ", ".join(f"{NAMES.get(name, name)} {value:,.0f}" for value, name in pairs)


def draw_attention(data: dict, colours: dict):
    """Draws a panel per pass, with each line's name at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5))
    axes = figure.subplots(1, len(data["passes"]), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.045, right=0.83, top=0.79, bottom=0.125, wspace=0.67)
    headings(figure, "Causal attention, bfloat16, 12 heads of 64", data["line"])
    top = 1.1 * data["limit"]
    for axis, (step, lines) in zip(axes, data["passes"].items(), strict=True):
        for name, line in lines.items():
            style = {"color": colours["peer"], "linewidth": 1.1, "markersize": 3}
            if line["ours"]:
                style = {"color": colours["ours"], "linewidth": 2.6, "markersize": 6, "zorder": 3}
                style |= {} if name == "triton" else {"markerfacecolor": colours["paper"]}
            axis.plot(*zip(*line["points"], strict=True), marker="o", **style)
        name_ends(axis, lines, top, colours)
        lengths = sorted({T for line in lines.values() for T, _ in line["points"]})
        limit = data["limit"]
        axis.axhline(limit, color=colours["ink"], linewidth=1, linestyle=(0, (5, 4)))
        axis.text(lengths[0], limit + 0.012 * top, f"limit, a large matrix product: {limit}",
                  va="bottom", fontsize=9)  # fmt: skip
        axis.set_title(f"{step}, TFLOP/s", loc="left", fontsize=10.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
        axis.minorticks_off()
        tokens = data["tokens"]
        axis.set_xlabel(f"T, with {tokens[0]:,} tokens in a batch" if len(tokens) == 1 else "T")
        axis.set_ylim(0, top)
        axis.grid(axis="y", color=colours["grid"], linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelleft=True, length=3)
    return figure


def name_ends(axis, lines: dict, top: float, colours: dict) -> None:
    """Writes name and rate of each line to the right of its end, without overlaps."""
    ends = sorted((line["points"][-1][1], name) for name, line in lines.items())
    heights = apart([rate for rate, _ in ends], 0.062 * top)
    right = max(line["points"][-1][0] for line in lines.values())
    for (rate, name), height in zip(ends, heights, strict=True):
        line = lines[name]
        axis.annotate(
            f"{NAMES.get(name, name)}  {rate:.0f}", (line["points"][-1][0], rate),
            (right * 1.25, height), va="center", annotation_clip=False, fontsize=9.5,
            color=colours["ours" if line["ours"] else "ink"],
            fontweight="bold" if line["ours"] else "normal",
            arrowprops={"arrowstyle": "-", "color": colours["peer"], "linewidth": 0.6,
                        "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def apart(heights: list[float], least: float) -> list[float]:
    """The ascending heights, moved so that neighbours are at least `least` apart. Heights that are
    too close are spread evenly around their mean."""
    groups = []  # lists of heights to spread together
    for height in heights:
        groups.append([height])
        while (
            len(groups) > 1 and spread(groups[-2], least)[-1] + least > spread(groups[-1], least)[0]
        ):
            last = groups.pop()
            groups[-1] += last
    return [height for group in groups for height in spread(group, least)]


def spread(group: list[float], least: float) -> list[float]:
    low = sum(group) / len(group) - least * (len(group) - 1) / 2
    return [low + i * least for i in range(len(group))]


def draw_train_step(data: dict, colours: dict):
    """Draws horizontal bars, a group per batch size, the fastest first."""
    from matplotlib.figure import Figure

    lines = sum(map(len, data["batches"].values())) + len(data["batches"])
    height = 0.29 * lines + 0.75  # inches
    figure = Figure(figsize=(10, height))
    axis = figure.add_axes((0.2, 0.1 / height, 0.68, 1 - 0.75 / height))
    title = "Training step of GPT-2 124M, T=1024, bfloat16 autocast: tokens per second"
    headings(figure, title, data["line"])
    fastest = max(speed for bars in data["batches"].values() for speed, *_ in bars)
    y = itertools.count()
    for B, bars in data["batches"].items():
        axis.text(0, next(y) + 0.1, f"B={B}", va="center", fontsize=10.5)
        for speed, name, ours in bars:
            at = next(y)
            axis.barh(at, speed, 0.7, color=colours["ours" if ours else "bar"], linewidth=0)
            style = {"va": "center", "color": colours["ours" if ours else "ink"],
                     "fontweight": "bold" if ours else "normal"}  # fmt: skip
            axis.text(-0.012 * fastest, at, NAMES.get(name, name), ha="right", **style)
            axis.text(speed + 0.01 * fastest, at, f"{speed:,.0f}", ha="left", **style)
    axis.set_ylim(lines - 0.5, -0.5)
    axis.set_xlim(0, fastest)
    axis.axis("off")
    return figure


def headings(figure, title: str, line: str) -> None:
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.08 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.34 / height, line, fontsize=9, va="top")
