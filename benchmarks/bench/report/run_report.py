"""Renders report.md of run_all.py: outcomes, failures, and all tables."""

import json
from pathlib import Path

import table

from bench import step_profile
from bench.result import label
from bench.result_file import SCHEMA
from bench.run.processes import Outcome

OK = "nothing failed"


def render(about: dict, kernels: str, outcomes: list[Outcome], seconds: float) -> str:
    """Markdown of everything that has finished so far."""
    documents = loaded(outcomes)
    failed = [o for o in outcomes if o.status == "failed"]
    blocks = [
        f"# {about['device_name']}",
        f"{seconds:.0f} s, {', '.join(o.job for o in failed) + ' failed' if failed else OK}.",
        "## Machine", fenced(json.dumps(about, indent=1)),
        "## Kernels", fenced(kernels or "not asked"),
        "## What ran", ran(outcomes),
        "## Goals", table.goal_table(documents),
        "## Results", table.render(documents),
        "## Every contender", everyone(documents),
        "## Where a training step's time goes", profiles(documents),
        "## Without a time", without(documents),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def loaded(outcomes: list[Outcome]) -> list[dict]:
    """The documents of the scripts that wrote results."""
    paths = [Path(outcome.json) for outcome in outcomes if outcome.json]
    documents = [json.loads(path.read_text()) for path in paths if path.is_file()]
    return [d for d in documents if d.get("schema") == SCHEMA and "results" in d]


def fenced(text: str) -> str:
    return f"```\n{text.strip()}\n```"


def ran(outcomes: list[Outcome]) -> str:
    lines = [("job", "status", "seconds", ""), ("---",) * 4]
    for o in outcomes:
        reasons = "; ".join(o.reasons).replace("|", "\\|")
        lines.append((o.job, o.status, f"{o.seconds:.1f}", reasons))
    return table.markdown(lines)


def everyone(documents: list[dict]) -> str:
    """A table of every contender's median ms, a line per case."""
    blocks = []
    for document in documents:
        timed = [r for r in document["results"] if r["status"] == "ok"]
        names = list(dict.fromkeys(r["contender"] for r in timed))
        cases = {}
        for r in timed:
            key = r["op"], r["step"], label(r["shape"]), r["dtype"]
            cases.setdefault(key, {})[r["contender"]] = f"{r['median_ms']:.4g}"
        if cases:
            head = ("op", "pass", "shape", "dtype", *(f"{name}, ms" for name in names))
            rows = [(*key, *(ms.get(name, "") for name in names)) for key, ms in cases.items()]
            blocks.append(table.markdown([head, ("---",) * len(head), *rows]))
    return "\n\n".join(blocks)


def profiles(documents: list[dict]) -> str:
    blocks = []
    for document in documents:
        by_case = {}
        for r in document["results"]:
            if r.get("details", {}).get("profile_ms"):
                key = f"{label(r['shape'])}, {r['dtype']}"
                by_case.setdefault(key, {})[r["contender"]] = r["details"]["profile_ms"]
        blocks += [f"{key}\n\n{fenced(step_profile.table(p))}" for key, p in by_case.items()]
    return "\n\n".join(blocks) or "not measured"


def without(documents: list[dict]) -> str:
    """A list of contenders without a time: status, reason, and in which cases."""
    where = {}
    for document in documents:
        for r in document["results"]:
            if r["status"] != "ok":
                key = r["status"], r["contender"], r["reason"]
                at = f"{r['op']} {r['step']} {label(r['shape'])}, {r['dtype']}"
                where.setdefault(key, []).append(at)
    order = {"error": 0, "wrong": 1, "skipped": 2, "unavailable": 3}
    return "\n".join(
        f"- {status}: {name}: {reason} ({at[0]}{f' and {len(at) - 1} more' if at[1:] else ''})"
        for (status, name, reason), at in sorted(where.items(), key=lambda item: order[item[0][0]])
    ) or "nothing"  # fmt: skip
