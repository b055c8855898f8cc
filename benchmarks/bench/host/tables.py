"""The tables of host.py, which host.py prints and table.py writes into docs/benchmarks.md.

A table is a list of rows of text, its first row the header.
"""

from bench.result import label

FORWARD, WITH_GRAD, BOTH = "forward", "forward with grad", "forward+backward"
PEER, PLAIN = "pytorch", "plain"
OP, STEP = "host_", "host_step"  # an op's name in the results begins with OP
# From the outside in: each is the time of a call less that of the call inside it
PARTS = ("argument checks", "dispatch", "autograd function", "raw op", "launcher")


def tables(rows: list[dict]) -> list[list[tuple[str, ...]]]:
    """The tables of each shape and dtype: all ops, a step of the small model, and for each backend
    the parts of a forward."""
    found = []
    timed = [r for r in rows if r["status"] == "ok"]
    for shape, dtype in dict.fromkeys((label(r["shape"]), r["dtype"]) for r in timed):
        mine = [r for r in timed if (label(r["shape"]), r["dtype"]) == (shape, dtype)]
        ops, steps = [[r for r in mine if (r["op"] == STEP) == wanted] for wanted in (False, True)]
        if ops:
            found.append(_ops(ops, f"µs, {shape}, {dtype}"))
        if steps:
            found.append(_steps(steps))
        for backend in _backends(ops):
            found.append(_where(ops, backend))
    return found


def _ops(rows: list[dict], title: str) -> list[tuple[str, ...]]:
    """A row per op: each contender's forward without gradients, then forward and backward."""
    contenders = [PEER, *_backends(rows)]
    others = contenders[1:]
    lines = [(title, f"{FORWARD}: {PEER}", *others, f"{BOTH}: {PEER}", *others)]
    for op in dict.fromkeys(r["op"] for r in rows):
        cells = [_find(rows, op, step, name) for step in (FORWARD, BOTH) for name in contenders]
        lines.append((op.removeprefix(OP), *(_time(row) for row in cells)))
    return lines


def _steps(rows: list[dict]) -> list[tuple[str, ...]]:
    sizes = ("n_layer", "n_embd", "vocab_size")
    title = f"a step of a small model, {label({name: rows[0]['details'][name] for name in sizes})}"
    lines = [(title, BOTH, f"of {PLAIN}")]
    for row in sorted(rows, key=lambda r: (r["kind"] == "backend", r["contender"])):
        name = f"fast, {row['contender']}" if row["kind"] == "backend" else row["contender"]
        times = row["times_faster_than"].get(PLAIN)
        lines.append(
            (name, f"{row['median_ms']:.2f} ms", "" if times is None else f"{1 / times:.2f}×")
        )
    return lines


def _where(rows: list[dict], backend: str) -> list[tuple[str, ...]]:
    """A row per op: the parts of its forward, and PyTorch's own op. All are the fastest of several
    rounds, so that the parts add up."""
    apart = {(r["op"], r["contender"]): found for r in rows
             if (found := r["details"].get("parts_us"))}  # fmt: skip
    lines = [(f"{backend}: a forward, µs, best", *PARTS, "whole", PEER)]
    for (op, contender), found in apart.items():
        if contender == backend:
            cells = (f"{found[part]:.1f}" if part in found else "" for part in PARTS)
            peer = apart.get((op, PEER))
            sums = (f"{sum(one.values()):.1f}" if one else "" for one in (found, peer))
            lines.append((op.removeprefix(OP), *cells, *sums))
    return lines


def _backends(rows: list[dict]) -> list[str]:
    """The backends sorted by name; the results have the fastest first."""
    return sorted({r["contender"] for r in rows if r["kind"] == "backend"})


def _find(rows: list[dict], op: str, step: str, contender: str) -> dict | None:
    wanted = op, step, contender
    return next((r for r in rows if (r["op"], r["step"], r["contender"]) == wanted), None)


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    times = row["times_faster_than"].get(PEER)
    ratio = f" ({1 / times:.2f}×)" if times and row["kind"] == "backend" else ""
    return f"{1e3 * row['median_ms']:.1f}{ratio}"


def text(lines: list[tuple[str, ...]]) -> str:
    """A table for the terminal: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w)
                  for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip
