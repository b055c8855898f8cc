"""Writes the tables and pictures of README.md and docs/benchmarks.md from the scripts' results.

    python benchmarks/table.py            # print docs/benchmarks.md's tables
    python benchmarks/table.py --write    # rewrite both files between the markers, and the pictures
    python benchmarks/table.py --check    # write nothing; exit code 1 if anything is out of date

The tables compare our fastest backend with the fastest peer of the same run, for each operation,
pass and shape. README shows the pictures (bench/report/pictures.py) and the ratio of the two, from
the newest run on a GPU and the newest on all cores of a CPU. docs/benchmarks.md starts with every
goal (bench/report/goals.py) beside its newest measurement.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from bench.host.tables import tables as host_tables
from bench.report.goals import GOALS, judged, targets
from bench.report.pictures import pictures
from bench.result import is_ours, label, significant

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = (
    "<!-- benchmarks: begin, written by benchmarks/table.py -->",
    "<!-- benchmarks: end -->",
)
WHERE = {"h200": "H200", "avx512": "AVX-512", "cpu": "any CPU"}
GOALS_TITLE = "**Goals**, and the newest measurement of each"
RATIOS_TITLE = (
    "**Times as fast as the best peer in the same run**, over all measured shapes; of a CPU, "
    "float32 with all threads."
)
HEADER = ("shape", "pass", "ours", "median", "rate", "of limit", "best peer", "ratio", "max error")


class BadInput(Exception):
    """A file cannot be read or has another format; the message is one line."""


def load(path: Path) -> dict:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BadInput(f"{path}: not a result of schema {SCHEMA}")
    return document


def load_all(root: Path) -> list[dict]:
    """All result documents: those of GPUs first, then by file name."""
    documents = [load(path) for path in sorted((root / "benchmarks/results").glob("*.json"))]
    return sorted(documents, key=lambda d: d["environment"].get("device") != "cuda")


def render(documents: list[dict]) -> str:
    """Markdown: a heading per machine and version, a table per operation and dtype."""
    if not documents:
        return "No measurement is recorded in benchmarks/results yet."
    blocks, previous = [], None
    for document in documents:
        about = where(document["environment"])
        if about != previous:
            blocks.append(about)
            previous = about
        if document.get("script") == "host":  # host time has neither rates nor limits
            blocks += ["**Host time**", *map(host_table, host_tables(document["results"]))]
            continue
        timed = [r for r in document["results"] if r["status"] == "ok"]
        for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in timed):
            limits = document["limits"][dtype]
            rows = [r for r in timed if (r["op"], r["dtype"]) == (op, dtype)]
            limit = f"{significant(limits[rows[0]['unit']])} {rows[0]['unit']}"
            blocks.append(f"**{op}**, {dtype} (limit measured in the same run: {limit})")
            blocks.append(table(rows))
    return "\n\n".join(blocks)


def host_table(lines: list[tuple[str, ...]]) -> str:
    return markdown([lines[0], ("---",) * len(lines[0]), *lines[1:]])


def summary(documents: list[dict]) -> str:
    """Markdown: a table per machine and version, a line per operation and dtype, with the newest
    ratios of each pass over all shapes. Host time is left out."""
    documents = [d for d in documents if d.get("script") != "host"]
    if not documents:
        return "No measurement is recorded in benchmarks/results yet."
    machines, blocks = {}, []
    for document in documents:
        machines.setdefault(machine(document["environment"]), []).append(document)
    for name, group in machines.items():
        commits = dict.fromkeys(commit(document["environment"]) for document in group)
        blocks.append(f"*{name}, {', '.join(commits)}*")
        newest = {}  # case -> date, our fastest and the fastest peer of one run
        for document in group:
            date = document["environment"]["date"]
            for key, pair in cases_of(document["results"]).items():
                if all(pair) and (key not in newest or date > newest[key][0]):
                    newest[key] = date, pair
        ratios = {}  # (op, dtype) -> pass -> the ratios of all shapes
        for (op, dtype, _, step), (_, (ours, peer)) in newest.items():
            by_pass = ratios.setdefault((op, dtype), {})
            by_pass.setdefault(step, []).append(peer["median_ms"] / ours["median_ms"])
        lines = [("operation", "dtype", "times as fast"), ("---",) * 3]
        for (op, dtype), by_pass in ratios.items():
            found = ", ".join(f"{step} {span(values)}" for step, values in by_pass.items())
            lines.append((op, dtype, found))
        blocks.append(markdown(lines))
    return "\n\n".join(blocks)


def headline(documents: list[dict]) -> list[dict]:
    """The documents of README's table: GPUs, and float32 on CPUs with the most threads."""
    most = max((d["environment"]["threads"] or 0 for d in documents), default=0)
    chosen = [d for d in documents if (d["environment"]["threads"] or 0) in (0, most)]
    return [
        d | {"results": [r for r in d["results"] if r["dtype"] == "float32"]}
        if d["environment"]["threads"] else d
        for d in chosen
    ]  # fmt: skip


def goal_table(documents: list[dict]) -> str:
    """Markdown: every goal, its newest measurement, and the targets missed or not measured."""
    head = ("operation", "pass", "dtype", "shape", "on", "goal", "measured", "best peer",
            "ratio", "of limit", "met")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for goal in GOALS:
        verdict = judged(goal, documents)
        ours, best = verdict.ours, verdict.best
        where_to = WHERE[goal.device]
        if goal.threads:
            where_to += f", {threads(goal.threads)}"
        measured = ["not measured", "", "", ""]
        if ours:
            measured = [
                f"{significant(ours['median_ms'])} ms, {significant(ours['rate'])} {ours['unit']}",
                best["contender"] if best else "",
                f"{best['median_ms'] / ours['median_ms']:.2f}×" if best else "",
                f"{ours['percent_of_limit']:.0f} %",
            ]
        op = f"{goal.op}, {goal.contender}" if goal.contender else goal.op
        lines.append((op, goal.step, goal.dtype, label(goal.shape), where_to,
                      "; ".join(targets(goal)), *measured,
                      verdict.met() if ours else ""))  # fmt: skip
    return markdown(lines)


def span(ratios: list[float]) -> str:
    """ "1.3 to 1.9×" """
    least, most = (f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
    return f"{least}×" if least == most else f"{least} to {most}×"


def where(about: dict) -> str:
    return f"*{machine(about)}, {commit(about)}, {about['date'][:10]}*"


def machine(about: dict) -> str:
    versions = [f"{name} {about[name]}" for name in ("torch", "triton", "cuda", "cudnn")]
    parts = [about["device_name"], *(v for v in versions if not v.endswith(" None"))]
    if about["threads"]:
        parts.append(threads(about["threads"]))
    return ", ".join(parts)


def threads(n: int) -> str:
    return f"{n} thread{'s' if n != 1 else ''}"


def commit(about: dict) -> str:
    return f"commit {about['commit']}{', changed' if about['dirty'] else ''}"


def cases_of(rows: list[dict]) -> dict:
    """(op, dtype, shape, pass) -> (our fastest row, the fastest peer's row); None if there is none.
    The reference counts as neither."""
    cases = {}
    for row in rows:
        if row["status"] == "ok" and (is_ours(row) or row["kind"] == "peer"):
            key = row["op"], row["dtype"], label(row["shape"]), row["step"]
            cases.setdefault(key, {"backend": [], "peer": []})[row["kind"]].append(row)
    return {
        key: tuple(min(case[kind], key=median, default=None) for kind in ("backend", "peer"))
        for key, case in cases.items()
    }


def table(rows: list[dict]) -> str:
    lines = [HEADER, ("---",) * len(HEADER)]
    for (_, _, shape, step), (ours, peer) in cases_of(rows).items():
        if ours is None:
            continue
        lines.append((
            shape,
            step,
            ours["contender"],
            f"{significant(ours['median_ms'])} ms",
            f"{significant(ours['rate'])} {ours['unit']}",
            f"{ours['percent_of_limit']:.0f} %",
            f"{peer['contender']} {significant(peer['median_ms'])} ms" if peer else "",
            f"{peer['median_ms'] / ours['median_ms']:.2f}×" if peer else "",
            f"{ours['max_error']:.1e}",
        ))  # fmt: skip
    return markdown(lines)


def markdown(lines: list[tuple]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median(result: dict) -> float:
    return result["median_ms"]


def replaced(text: str, tables: str, path: Path) -> str:
    """`text` with `tables` between its two markers. Raises BadInput if there are no markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BadInput(f"{path}: needs one line {BEGIN!r} and after it one line {END!r}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{tables}\n\n{END}{text.partition(END)[2]}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the project")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="rewrite tables and pictures")
    action.add_argument("--check", action="store_true", help="fail if any is out of date")
    options = parser.parse_args(argv)
    root = options.root
    try:
        documents = load_all(root)
        shown = pictures(documents)
        details = "\n\n".join([GOALS_TITLE, goal_table(documents), RATIOS_TITLE,
                               summary(documents), render(documents)])  # fmt: skip
        overview = [picture.markup() for picture in shown]
        overview += [RATIOS_TITLE, summary(headline(documents))]
        tables = {"README.md": "\n\n".join(overview), "docs/benchmarks.md": details}
        old = {name: (root / name).read_text() for name in tables}
        new = {name: replaced(old[name], tables[name], root / name) for name in tables}
        # outdated file -> the function that writes it
        stale = {name: partial((root / name).write_text, new[name])
                 for name in tables if new[name] != old[name]}  # fmt: skip
        stale |= {str(p): partial(p.write, root) for p in shown if p.stale(root)}
    except KeyError as error:
        print(f"table.py: error: a result lacks {error}", file=sys.stderr)
        return 2
    except (BadInput, OSError) as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return 2
    if options.check and stale:
        print(f"{', '.join(stale)}: out of date, see benchmarks/table.py --write", file=sys.stderr)
        return 1
    for write in stale.values() if options.write else ():
        write()
    if not options.write and not options.check:
        print(tables["docs/benchmarks.md"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
