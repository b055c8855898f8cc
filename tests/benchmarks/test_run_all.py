"""run_all.py: a crash, a hang, a wrong result or a slow contender affects nothing else, and is
reported.

Most scripts here are stand-ins that write records like the real ones, without importing PyTorch.
Times are never tested.
"""

import json
import sys

import pytest
import run_all
import table
import torch
from bench import (
    environment,
)
from bench.run import (
    plan,
    processes,
)
from processes import ROOT

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace as Shape
sys.path.insert(0, {benchmarks!r})
from bench.result import Result
from bench.result_file import Case, Record

mode, path = sys.argv[1], Path(sys.argv[2])
about = {{"device_name": "Abacus", "torch": "2", "triton": None, "cuda": None, "cudnn": None,
          "threads": 1, "commit": "abc", "dirty": False, "date": "2026-01-02T03:04:05Z"}}
record = Record(path, mode, about, only={{"backend": None, "peer": None}},
                resume="--resume" in sys.argv)
record.limits["float32"] = {{"GB/s": 10.0}}
case = Case("gelu", {{"N": 4, "C": 8}}, "float32", ("forward", "backward"))
names = [("cpu", "backend"), ("bad", "backend"), ("eager", "peer")]
failed = False
for c in record.wanted(case, [Shape(name=n, kind=k) for n, k in names]):
    record.begin(case, [c], case.steps)
    about = case.shape, case.dtype, c.name, c.kind
    if c.name == "bad" and mode != "good":
        if mode == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif mode == "hang":
            time.sleep(600)
        elif mode == "traceback":
            raise ValueError("something of the script's own")
        status = "wrong" if mode == "wrong" else "error"
        record.add(*(Result("gelu", s, *about, status=status, reason=mode) for s in case.steps))
        failed = True
        if mode == "lost":
            sys.exit(3)
        continue
    record.add(*(Result("gelu", s, *about, median_ms=1.0, p20_ms=1.0, p80_ms=1.0, rate=1.0,
                        unit="GB/s", percent_of_limit=10.0, max_error=0.0) for s in case.steps))
record.settle(case)
sys.exit(1 if failed else 0)
"""
ABOUT = {
    "device": "cpu", "device_name": "Abacus 3", "threads": 1, "cpu_capability": "AVX2",
}  # fmt: skip


@pytest.fixture
def whole_run(tmp_path, monkeypatch):
    """run(*modes, argv) -> exit code, outcomes by job, results by job; each mode is a script."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run_all, "described", lambda device, env: ABOUT)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(benchmarks=str(ROOT / "benchmarks")))
    out = tmp_path / "out"

    def run(*modes, argv=(), stall_s=60.0, commands=None):
        def job(out, mode):
            path = out / f"{mode}.json"
            command = (sys.executable, str(script), mode, str(path))
            return processes.Job(mode, (commands or {}).get(mode, command), path, stall_s=stall_s)

        def planned(device, quick, only, out, slug):
            return plan.Plan([], [], [job(out, mode) for mode in modes])

        code = run_all.main(["--out", str(out), "--device", "cpu", *argv], planned)
        ended = json.loads((out / "outcomes.json").read_text())["outcomes"]
        outcomes = {o["job"]: o for o in ended if o["job"] != "plots"}
        results = {m: json.loads((out / f"{m}.json").read_text())["results"]
                   for m in modes if (out / f"{m}.json").exists()}  # fmt: skip
        return code, outcomes, results

    run.out = out
    return run


def states(rows):
    return {(r["contender"], r["step"]): (r["status"], r["reason"]) for r in rows}


@pytest.mark.parametrize(
    ("mode", "status", "reason"),
    [
        ("segfault", "error", "died by SIGSEGV"),
        ("hang", "error", "no progress in 1 s, killed"),
        ("traceback", "error", "exit code 1: ValueError: something of the script's own"),
        ("wrong", "wrong", "wrong"),
        ("lost", "error", "lost"),
    ],
)
def test_trouble_costs_itself_alone(mode, status, reason, whole_run, capsys):
    """The results before and after it in its own script exist, and those of the next script."""
    stall_s = 1.0 if mode == "hang" else 60.0
    argv = ["--minutes", "1"]
    code, outcomes, results = whole_run(mode, "good", argv=argv, stall_s=stall_s)
    assert code == 1
    assert outcomes[mode]["status"] == "failed" and outcomes["good"]["status"] == "ok"
    assert any(reason in line for line in outcomes[mode]["reasons"])
    found = states(results[mode])
    for step in ("forward", "backward"):
        assert found["bad", step] == (status, reason)
        assert found["cpu", step][0] == found["eager", step][0] == "ok"
    assert len(results[mode]) == 6, "nothing is measured twice"
    assert all(s == "ok" for s, _ in states(results["good"]).values())
    report = (whole_run.out / "report.md").read_text()
    assert f"{mode} failed" in report and f"- {status}: bad: {reason} (gelu forward" in report
    assert "| N=4 C=8 | forward | cpu |" in report
    assert f"{mode}: failed" in capsys.readouterr().out


def test_a_script_that_leaves_nothing_fails(whole_run):
    """After an ImportError, or an exit with code 0."""
    commands = {
        "broken": (sys.executable, "-c", "import nowhere_to_be_found"),
        "silent": (sys.executable, "-c", "pass"),
    }
    code, outcomes, results = whole_run("broken", "silent", "good", commands=commands)
    assert code == 1 and list(results) == ["good"]
    assert "No module named 'nowhere_to_be_found'" in outcomes["broken"]["reasons"][0]
    assert outcomes["silent"]["reasons"] == ["it wrote no results"]


def test_all_well(whole_run):
    code, outcomes, _ = whole_run("good")
    assert code == 0 and outcomes["good"]["status"] == "ok"
    assert "nothing failed" in (whole_run.out / "report.md").read_text()


def test_results_of_an_earlier_run_are_not_taken_over(whole_run):
    whole_run("good")
    stale = whole_run.out / "good.json"
    stale.write_text(stale.read_text().replace('"median_ms": 1.0', '"median_ms": 9.0'))
    _, _, results = whole_run("good")
    assert {r["median_ms"] for r in results["good"]} == {1.0}
    commands = {"good": (sys.executable, "-c", "raise SystemExit(1)")}
    code, outcomes, results = whole_run("good", commands=commands)
    assert code == 1 and outcomes["good"]["status"] == "failed" and not results


def test_out_of_time_is_said_and_no_failure(whole_run):
    """The script that is running at the deadline is killed; the next is not started."""
    code, outcomes, results = whole_run("hang", "good", argv=["--minutes", "0.04"])
    assert code == 0
    assert outcomes["hang"]["status"] == "skipped"
    assert states(results["hang"])["bad", "forward"] == ("skipped", "out of time")
    assert states(results["hang"])["cpu", "forward"][0] == "ok", "what was measured is kept"
    assert outcomes["good"] == {"job": "good", "status": "skipped", "reasons": ["out of time"],
                                "seconds": 0.0, "json": None}  # fmt: skip
    report = (whole_run.out / "report.md").read_text()
    assert "| good | skipped | 0.0 | out of time |" in report


def planned_scripts(*commands):
    """name, script and options -> a plan of real scripts, with tiny shapes."""

    def planned(device, quick, only, out, slug):
        benches = []
        for name, script, *arguments in commands:
            path = out / f"{slug}-{name}.json"
            command = (sys.executable, str(script), "--device", "cpu", "--quick", *arguments)
            command += ("--json", str(path))
            benches.append(processes.Job(name, command, path, stall_s=20.0))
        return plan.Plan([], [], benches)

    return planned


@pytest.mark.full
def test_a_real_script(tmp_path, monkeypatch):
    """From the description of the machine to the report, with no part replaced."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gelu = "gelu-fp32", ROOT / "benchmarks/gelu.py", "--shapes", "4x8", "--backends", "reference"
    planned = planned_scripts((*gelu, "--peers", "eager"))
    argv = ["--out", str(tmp_path), "--device", "cpu", "--threads", "1", "--quick"]
    assert run_all.main(argv, planned) == 0
    about = json.loads((tmp_path / "environment.json").read_text())
    slug = environment.slug(about)
    assert about["torch"] == torch.__version__ and slug.endswith("-1thread")
    document = table.load(tmp_path / f"{slug}-gelu-fp32.json")
    assert document["environment"]["threads"] == 1 and "running" not in document
    assert {r["status"] for r in document["results"]} == {"ok"} and len(document["results"]) == 8
    assert (tmp_path / f"{slug}-gelu-fp32.png").exists()
    report = (tmp_path / "report.md").read_text()
    head = next(line for line in report.splitlines() if line.startswith("| op | pass | shape |"))
    assert "reference, ms" in head and "eager, ms" in head


PLANTED = """
import os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
from bench import harness
from bench.clock import BYTE, Work
from bench.harness import Contender, Op

def dies(x):
    os.kill(os.getpid(), signal.SIGSEGV)

def dies_while_timed(x, calls=[]):
    calls.append(1)
    return dies(x) if len(calls) > 5 else x * x

def peers(device):
    yield Contender("eager", lambda x: x * x)
    yield Contender("dies", dies)
    yield Contender("hangs", lambda x: time.sleep(600))

op = Op(name="square", kernel="gelu", inputs=lambda s, randn, _: [randn(s.N, s.C)],
        call=dies_while_timed if "late" in sys.argv[0] else lambda x: 1.01 * x * x,
        truth=lambda x: x * x, plain=lambda x: x * x, peers=peers,
        work=lambda s, step, size: Work(s.N * s.C * size, BYTE))
sys.exit(harness.main([op], doc="", dims="NxC", shapes={{"cpu": "4x8"}}))
"""


@pytest.mark.full
def test_planted_kernels_in_the_real_harness(tmp_path, monkeypatch):
    """Our wrong kernel, a peer that crashes, one that hangs. A kernel that crashes while timed also
    ends the contenders that alternate with it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    paths = [tmp_path / "planted.py", tmp_path / "late.py"]
    for path in paths:
        path.write_text(PLANTED.format(benchmarks=str(ROOT / "benchmarks")))
    alone = ("--backends", "reference", "--peers", "eager")
    planned = planned_scripts(("planted", paths[0], *alone[:2]), ("late", paths[1], *alone))
    out = tmp_path / "out"
    assert run_all.main(["--out", str(out), "--device", "cpu"], planned) == 1
    found = {path.stem.rpartition("-")[2]: states(table.load(path)["results"])
             for path in out.glob("*thread-*.json")}  # fmt: skip
    for step in ("forward", "backward"):
        planted = {name: found["planted"][name, step] for name in ("eager", "dies", "hangs")}
        assert found["planted"]["reference", step][0] == "wrong"
        assert planted == {"eager": ("ok", None), "dies": ("error", "died by SIGSEGV"),
                           "hangs": ("error", "no progress in 20 s, killed")}  # fmt: skip
        assert found["late"]["reference", step] == ("error", "died by SIGSEGV")


def test_shares_are_of_the_time_that_is_left():
    now = processes.time.monotonic()
    two = [processes.Job("a", (), share=3.0), processes.Job("b", (), share=1.0)]
    assert processes.budget(two, now + 100) == pytest.approx(75, abs=1)
    assert processes.budget(two[1:], now + 40) == pytest.approx(40, abs=1)
    assert processes.budget([processes.Job("c", (), most_s=5.0)], now + 40) == 5.0


def test_what_a_killed_job_has_started_dies_with_it(tmp_path):
    """A compiler's workers would go on and disturb the next measurement."""
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(1.2); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
    job = processes.Job("parent", (sys.executable, "-c", code + "time.sleep(60)"), stall_s=0.4,
                   resumes=False)  # fmt: skip
    outcome = processes.run(job, 60, processes.time.monotonic() + 60, tmp_path / "log")
    assert outcome.status == "failed" and "no progress" in outcome.reasons[0]
    processes.time.sleep(1.0)
    assert not marker.exists()
