"""README's tables, from the results that the scripts wrote: never typed by hand.

    python benchmarks/table.py                      # print them
    python benchmarks/table.py --readme README.md   # rewrite what stands between the two markers
    python benchmarks/table.py --readme README.md --check    # exit code 1 if that is out of date

For each operation, pass and shape: the fastest backend of ours beside the fastest of all peers.
"""

import argparse
import json
import sys
from pathlib import Path

from report import label, significant

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
BEGIN, END = (
    "<!-- benchmarks: begin, written by benchmarks/table.py -->",
    "<!-- benchmarks: end -->",
)
HEADER = ("shape", "pass", "ours", "median", "rate", "of limit", "best peer", "ratio", "max error")


class BadInput(Exception):
    """A file that is not what it should be; the message is one line."""


def load(path: Path) -> dict:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BadInput(f"{path}: not a result of schema {SCHEMA}")
    return document


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
        timed = [r for r in document["results"] if r["status"] == "ok"]
        for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in timed):
            limits = document["limits"][dtype]
            rows = [r for r in timed if (r["op"], r["dtype"]) == (op, dtype)]
            limit = f"{significant(limits[rows[0]['unit']])} {rows[0]['unit']}"
            blocks.append(f"**{op}**, {dtype} (limit measured in the same run: {limit})")
            blocks.append(table(rows))
    return "\n\n".join(blocks)


def where(about: dict) -> str:
    versions = [f"{name} {about[name]}" for name in ("torch", "triton", "cuda", "cudnn")]
    parts = [about["device_name"], *(v for v in versions if not v.endswith(" None"))]
    if about["threads"]:
        parts.append(f"{about['threads']} threads")
    parts.append(f"commit {about['commit']}{', changed' if about['dirty'] else ''}")
    return f"*{', '.join(parts)}, {about['date'][:10]}*"


def table(rows: list[dict]) -> str:
    lines = [HEADER, ("---",) * len(HEADER)]
    for shape, step in dict.fromkeys((label(r["shape"]), r["step"]) for r in rows):
        case = [r for r in rows if (label(r["shape"]), r["step"]) == (shape, step)]
        ours = min((r for r in case if r["kind"] == "backend"), key=median, default=None)
        peer = min((r for r in case if r["kind"] == "peer"), key=median, default=None)
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
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median(result: dict) -> float:
    return result["median_ms"]


def replaced(text: str, tables: str, path: Path) -> str:
    """`text` with `tables` between the two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BadInput(f"{path}: needs one line {BEGIN!r} and after it one line {END!r}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{tables}\n\n{END}{text.partition(END)[2]}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--readme", type=Path, help="rewrite the tables in this file")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    options = parser.parse_args(argv)
    if options.check and not options.readme:
        parser.error("--check needs --readme")
    try:
        tables = render([load(path) for path in sorted(options.results.glob("*.json"))])
        if not options.readme:
            print(tables)
            return 0
        old = options.readme.read_text()
        new = replaced(old, tables, options.readme)
    except (BadInput, OSError) as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if options.check:
        print(f"{options.readme} is out of date: run benchmarks/table.py --readme", file=sys.stderr)
        return 1
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
