"""run_all.py: what crashes, hangs, lies or takes too long costs itself alone, and is reported.

Most scripts here are stand-ins that keep a record as the real ones do, and import no PyTorch. Times
are never judged.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import clock  # noqa: E402
import contest  # noqa: E402
import jobs  # noqa: E402
import machine  # noqa: E402
import options  # noqa: E402
import plan  # noqa: E402
import record  # noqa: E402
import run_all  # noqa: E402
import table  # noqa: E402

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace as Shape
sys.path.insert(0, {benchmarks!r})
from record import Case, Record
from report import Result

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
            return jobs.Job(mode, (commands or {}).get(mode, command), path, stall_s=stall_s)

        def planned(device, quick, only, tests):
            none = lambda out, slug: []  # noqa: E731
            return plan.Plan(none, none, lambda out, slug: [job(out, mode) for mode in modes])

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
    """What is measured before and after it in its own script is there, and the next script's."""
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
    """An ImportError, or an exit that says all is well."""
    commands = {
        "broken": (sys.executable, "-c", "import nowhere_to_be_found"),
        "silent": (sys.executable, "-c", "pass"),
    }
    code, outcomes, results = whole_run("broken", "silent", "good", commands=commands)
    assert code == 1 and list(results) == ["good"]
    assert "No module named 'nowhere_to_be_found'" in outcomes["broken"]["reasons"][0]
    assert outcomes["silent"]["reasons"] == ["it has left no results"]


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
    """The script that is running at the deadline is killed; the next is not begun."""
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

    def benches(out, slug):
        for name, script, *arguments in commands:
            path = out / f"{slug}-{name}.json"
            command = (sys.executable, str(script), "--device", "cpu", "--quick", *arguments)
            yield jobs.Job(name, (*command, "--json", str(path)), path, stall_s=20.0)

    none = lambda out, slug: []  # noqa: E731
    return lambda *_: plan.Plan(none, none, lambda out, slug: list(benches(out, slug)))


@pytest.mark.full
def test_a_real_script(tmp_path, monkeypatch):
    """From the machine's description to the report, with nothing in between replaced."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gelu = "gelu-fp32", ROOT / "benchmarks/gelu.py", "--shapes", "4x8", "--backends", "reference"
    planned = planned_scripts((*gelu, "--peers", "eager"))
    argv = ["--out", str(tmp_path), "--device", "cpu", "--threads", "1", "--quick"]
    assert run_all.main(argv, planned) == 0
    about = json.loads((tmp_path / "environment.json").read_text())
    slug = machine.slug(about)
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
import harness
from clock import BYTE, Work
from harness import Contender, Op

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
    """A wrong kernel of ours, a peer that dies, one that hangs; a kernel that dies when it is
    timed takes those with it that are timed in turns with it."""
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
    now = jobs.time.monotonic()
    two = [jobs.Job("a", (), share=3.0), jobs.Job("b", (), share=1.0)]
    assert jobs.budget(two, now + 100) == pytest.approx(75, abs=1)
    assert jobs.budget(two[1:], now + 40) == pytest.approx(40, abs=1)
    assert jobs.budget([jobs.Job("c", (), most_s=5.0)], now + 40) == 5.0


def test_what_a_killed_job_has_started_dies_with_it(tmp_path):
    """A compiler's workers would go on and spoil the next measurement."""
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(1.2); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
    job = jobs.Job("parent", (sys.executable, "-c", code + "time.sleep(60)"), stall_s=0.4,
                   resumes=False)  # fmt: skip
    outcome = jobs.run(job, 60, jobs.time.monotonic() + 60, tmp_path / "log")
    assert outcome.status == "failed" and "no progress" in outcome.reasons[0]
    jobs.time.sleep(1.0)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "/etc/passwd/out"], "'/etc/passwd/out' cannot be written"),
        (["--out", "{out}", "--only", "softmax"], "'softmax' is none of attention, layer_norm"),
        (["--out", "{out}", "--minutes", "-1"], "'-1' is not a positive number"),
        (["--out", "{out}", "--minutes", "soon"], "'soon' is not a positive number"),
        (["--out", "{out}", "--threads", "0"], "'0' is not a positive integer"),
        (["--out", "{out}", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_bad_options_are_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit:
        run_all.main([a.format(out=out) for a in arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not out.exists(), "nothing is written"


def test_interpreted_kernels_are_not_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        run_all.main(["--out", str(tmp_path / "out")])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_a_lost_context_is_noticed(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    contest.still_alive(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(contest.ContextLost, match="an illegal memory access was encountered"):
        contest.still_alive(torch.device("cuda"))


def test_on_a_gpu_each_has_it_to_itself(monkeypatch, tmp_path):
    """Checked, timed, and released, before the next one; here on a GPU that does nothing."""
    did = []
    gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("release"))

    def check(contender):
        did.append(f"check {contender.name}")
        if contender.name == "large":
            raise torch.OutOfMemoryError("no room")
        return 0.0

    def timed(step, group):
        did.append(f"time {step} {','.join(c.name for c in group)}")
        return {c: {"median_ms": 2.0, "p20_ms": 2.0, "p80_ms": 2.0} for c in group}

    kept = record.Record(tmp_path / "out.json", "gelu", {}, only={"backend": None, "peer": None})
    case = record.Case("gelu", {"N": 1}, "bfloat16", ("forward", "backward"))
    ours, large = (contest.Contender(n, len, kind="backend") for n in ("triton", "large"))
    work = clock.Work(2e9, clock.BYTE)
    contenders = [ours, large, contest.Contender("eager", len)]
    contest.contest(kept, case, contenders, gpu, {"GB/s": 4000.0}, lambda s, c: work, check, timed)
    assert did == [
        "check triton", "synchronize", "time forward triton", "time backward triton", "release",
        "check large", "synchronize", "release",
        "check eager", "synchronize", "time forward eager", "time backward eager", "release",
    ]  # fmt: skip
    rows = {(r.contender, r.step): r for r in kept.settle(case)}
    assert rows["triton", "forward"].percent_of_limit == pytest.approx(25)
    assert rows["triton", "backward"].times_faster_than == {"eager": 1.0}
    assert rows["large", "forward"].reason == "OutOfMemoryError: no room"
    document = record.read(tmp_path / "out.json")
    assert len(document["results"]) == 6 and "running" not in document


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("NVIDIA H200", "cuda", "h200"),
        ("NVIDIA H100 80GB HBM3", "cuda", "h100"),
        ("NVIDIA A100-SXM4-80GB", "cuda", "a100"),
        ("NVIDIA RTX A6000", "cuda", "a6000"),
        ("AMD EPYC", "cpu", "epyc-avx512-2thread"),
        ("Intel(R) Xeon(R) Platinum 8480+", "cpu", "xeon-avx512-2thread"),
    ],
)
def test_names_of_machines(name, device, expected):
    about = {"device": device, "device_name": name, "threads": 2, "cpu_capability": "AVX512"}
    assert machine.slug(about) == expected


def test_report_of_this_machine(monkeypatch):
    about = machine.report(torch.device("cpu"))
    assert about["cores"] and about["peers"]["flash-attn-3"] and about["nvidia_smi"]
    json.dumps(about)
    answer = ", ".join(["NVIDIA H200", "580.1", *map(str, range(len(machine.SMI) - 2))])
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine, "_output", lambda *command: f"{answer}\n")
    assert machine.nvidia_smi()["driver_version"] == "580.1"


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan(device, quick, tmp_path):
    """Every job is a command that its script understands, and the first is what matters most."""
    planned = plan.planned(device, quick, None, True)
    benches = planned.benches(tmp_path, "abacus")
    first = benches[: len(run_all.SCRIPTS)]
    assert [job.name.rpartition("-")[0] for job in first] == list(run_all.SCRIPTS)
    assert len({job.json for job in benches}) == len(benches)
    for job, bench in zip(benches, plan.ON_GPU if device == "cuda" else plan.ON_CPU, strict=False):
        script = __import__(bench.script)
        command = list(job.command)
        assert Path(command[1]).is_file() and job.json.name.startswith("abacus-")
        chosen = command[command.index("--shapes") + 1] if "--shapes" in command else ""
        for shape in filter(None, [*chosen.split(","), bench.quick]):
            assert options.parse_shape(shape, script.DIMS)
    assert planned.tests(tmp_path, "abacus") and planned.builds(tmp_path, "abacus")
    assert not plan.planned(device, quick, ["gelu"], False).tests(tmp_path, "abacus")
    only = plan.planned(device, quick, ["gelu"], False).benches(tmp_path, "abacus")
    assert {job.name.partition("-")[0] for job in only} == {"gelu"}
    for job in planned.tests(tmp_path, "abacus"):
        files = [word for word in job.command if word.startswith("tests/")]
        assert files and all((ROOT / file).is_file() for file in files)
