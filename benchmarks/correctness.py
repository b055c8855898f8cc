"""A sample of the tests within a time limit, and what came of it as JSON.

    python benchmarks/correctness.py --json out.json --seconds 60 -- tests/test_gelu.py -m triton

The file is written after every test, so that one which ends the process is named in it:
{"schema", "collected", "passed", "failed", "skipped", "not_run", "seconds", "running",
 "cases": {backend: {"cases", "compared"}}, "failures": [[test, message]], "skips": {reason: n}}.
The exit code is 1 where a test failed or none could run; running out of time is no failure.
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import pytest
from options import Parser, positive, writable
from record import SCHEMA, write


class Log:
    """A plugin of pytest that counts, writes, and stops at the deadline."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.counts = collections.Counter()
        self.cases, self.compared = collections.Counter(), collections.Counter()
        self.skips, self.failures = collections.Counter(), []
        self.collected, self.running, self.session = 0, None, None

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_collection_finish(self, session):
        self.collected = len(session.items)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed(report)

    def pytest_runtest_logstart(self, nodeid):
        self.running = nodeid
        self.write()

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.counts["skipped"] += 1
            self.skips[str(report.longrepr[-1]).removeprefix("Skipped: ")] += 1
        elif report.failed:
            self.failed(report)
        elif report.when == "call":
            self.counts["passed"] += 1
        if report.when == "call" and not report.skipped:
            compared = [name for key, name in report.user_properties if key == "compared"]
            self.compared.update(compared)
            self.cases.update(set(compared))
        late = time.monotonic() - self.start >= self.seconds
        if report.when == "teardown" and late and self.session:
            self.session.shouldstop = "out of time"

    def pytest_sessionfinish(self):
        self.running = None
        self.write()

    def failed(self, report):
        self.counts["failed"] += 1
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        self.failures.append([report.nodeid, " ".join(message.split())[:200]])

    def write(self):
        counts = {name: self.counts[name] for name in ("passed", "failed", "skipped")}
        write(self.path, {
            "schema": SCHEMA, "collected": self.collected, **counts,
            "not_run": max(0, self.collected - sum(counts.values())),
            "seconds": round(time.monotonic() - self.start, 1), "running": self.running,
            "cases": {name: {"cases": n, "compared": self.compared[name]}
                      for name, n in sorted(self.cases.items())},
            "failures": self.failures, "skips": dict(self.skips),
        })  # fmt: skip


def main(argv=None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=writable, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=positive, default=120.0, metavar="S")
    parser.add_argument("tests", nargs="+", help="files and options for pytest, after --")
    options = parser.parse_args(argv)
    log = Log(options.json, options.seconds)
    code = pytest.main(["-p", "no:cacheprovider", *options.tests], plugins=[log])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED):
        return 1
    return 1 if log.counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
