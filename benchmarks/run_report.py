"""report.md of run_all.py: what ran, what failed, every table."""

import json
from pathlib import Path

import step_profile
import table
from jobs import Outcome
from record import SCHEMA
from report import label

OK = "nothing failed"


def render(about: dict, kernels: str, outcomes: list[Outcome], seconds: float) -> str:
    """Markdown, of as much as has ended."""
    documents, tests = loaded(outcomes)
    failed = [o for o in outcomes if o.status == "failed"]
    blocks = [
        f"# {about['device_name']}",
        f"{seconds:.0f} s, {', '.join(o.job for o in failed) + ' failed' if failed else OK}.",
        "## Machine", fenced(json.dumps(about, indent=1)),
        "## Kernels", fenced(kernels or "not asked"),
        "## What ran", ran(outcomes),
        "## Tests", *(of_tests(name, found) for name, found in tests.items()),
        *([] if tests else ["none"]),
        "## Goals", table.goal_table(documents),
        "## Results", table.render(documents),
        "## Every contender", everyone(documents),
        "## Where a training step's time goes", profiles(documents),
        "## Without a time", without(documents),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def loaded(outcomes: list[Outcome]) -> tuple[list[dict], dict[str, dict]]:
    """The documents of the scripts that left results, and those of the tests by their job."""
    documents, tests = [], {}
    for outcome in outcomes:
        path = Path(outcome.json) if outcome.json else None
        if path is None or not path.is_file():
            continue
        found = json.loads(path.read_text())
        if found.get("schema") == SCHEMA and "results" in found:
            documents.append(found)
        elif "passed" in found:
            tests[outcome.job] = found
    return documents, tests


def fenced(text: str) -> str:
    return f"```\n{text.strip()}\n```"


def ran(outcomes: list[Outcome]) -> str:
    lines = [("job", "status", "seconds", ""), ("---",) * 4]
    for o in outcomes:
        reasons = "; ".join(o.reasons).replace("|", "\\|")
        lines.append((o.job, o.status, f"{o.seconds:.1f}", reasons))
    return table.markdown(lines)


def of_tests(name: str, found: dict) -> str:
    counts = ", ".join(f"{found[key]} {key}" for key in ("passed", "failed", "skipped"))
    lines = [f"**{name}**: {counts}, {found['not_run']} not run, {found['seconds']} s"]
    if found["running"]:
        lines.append(f"- ended in {found['running']}")
    lines += [f"- {backend}: {n['cases']} cases, {n['compared']} results compared with float64"
              for backend, n in found["cases"].items()]  # fmt: skip
    lines += [f"- FAILED {test}: {message}" for test, message in found["failures"]]
    lines += [f"- {n} skipped: {reason}" for reason, n in found["skips"].items()]
    return "\n".join(lines)


def everyone(documents: list[dict]) -> str:
    """Median ms of every contender: a line per case."""
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
    """Each contender that has no time somewhere: status, reason, and where."""
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
