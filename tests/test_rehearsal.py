"""The first phase of run_all.py: what torch.compile makes for the contenders is compiled before the
clock runs, by every script itself (--compile-only), side by side."""

import collections
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import clock  # noqa: E402
import contest  # noqa: E402
import gelu  # noqa: E402
import generate  # noqa: E402
import harness  # noqa: E402
import jobs  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
import plan  # noqa: E402
import run_all  # noqa: E402
import train_step  # noqa: E402
from record import Case, Record  # noqa: E402

from gpt2 import Config, kernels  # noqa: E402

CPU = torch.device("cpu")
ANYBODY = {"backend": None, "peer": None}


@pytest.fixture
def rehearsal(monkeypatch):
    """A record that a rehearsal must leave empty, and a clock that must not run."""
    monkeypatch.setattr(clock.Clock, "__call__", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(Record, "_write", lambda *args: pytest.fail("written"))
    return Record(Path("unwritten.json"), "any", {}, only=ANYBODY, rehearsal=True)


def of_compiled(calls, name="compiled", **options):
    """A contender that notes when it is called, and for a gradient or not."""

    def call(x):
        calls.append((name, torch.is_grad_enabled()))
        return torch.nn.functional.gelu(x, approximate="tanh")

    return contest.Contender(name, call, **options)


def test_the_compiled_alone_run_forward_and_backward(rehearsal):
    """As they will run, so that the same code is compiled; trouble waits for the contest."""
    calls = []

    def failing(x):
        raise RuntimeError("not today")

    def peers(device):
        yield contest.Contender("broken", failing, compiles=True)
        yield of_compiled(calls, "eager")
        yield of_compiled(calls, "absent", compiles=True, why_not="not installed")
        yield of_compiled(calls, compiles=True)

    op = dataclasses.replace(gelu.OPS[0], peers=peers)
    shape = SimpleNamespace(N=2, C=8)
    case = harness.measure(op, shape, torch.float32, clock.Clock(CPU, True), {}, rehearsal)
    assert case is None and not rehearsal.results
    assert calls == [("compiled", False), ("compiled", True)]


@pytest.mark.full
def test_a_script_that_rehearses_measures_nothing(tmp_path):
    """Not even the machine's limits, and it leaves no file."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_I", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "benchmarks/gelu.py", "--device", "cpu", "--shapes", "2x8", "--peers",
         "eager", "--compile-only", "--json", tmp_path / "out.json"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "limits" not in done.stdout and not list(tmp_path.iterdir())


def test_a_training_step_is_rehearsed(rehearsal, monkeypatch):
    stepped = []
    config = Config(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)
    monkeypatch.setattr(train_step, "CONFIG", config)

    def makers(plain):
        def made(name):
            return lambda: (stepped.append(name), models.ours(plain, False))[1]

        return {name: made(name) for name in (*models.BACKENDS, *models.PEERS)}

    monkeypatch.setattr(models, "makers", makers)
    shape = SimpleNamespace(B=2, T=8)
    args = shape, torch.float32, clock.Clock(CPU, True), {}, rehearsal
    assert train_step.measure(*args) is None
    assert sorted(stepped) == ["compiled", "fast-compiled"], "reduce-overhead needs a GPU"


def test_generation_is_rehearsed(rehearsal, monkeypatch):
    called = []

    class Makers:
        def __init__(self, *args):
            pass

        def by_name(self, name):
            return lambda: lambda prompts, n: called.append(name)

    monkeypatch.setattr(generate, "Makers", Makers)
    monkeypatch.setattr(generate.Config, "named", lambda name: Config(8, 64, 1, 1, 8))
    shape = SimpleNamespace(B=1, P=4)
    args = shape, torch.float32, clock.Clock(CPU, True), {}, rehearsal
    assert generate.CASES[0](*args, chosen=["gpt2"], tokens=3) is None
    assert called == ["transformers-static", "compiled"]


def test_every_contender_of_a_training_step_has_a_maker():
    plain = train_step.Model(Config(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    makers = models.makers(plain)
    assert set(makers) == {*models.BACKENDS, *models.PEERS}
    assert set(models.COMPILED) <= set(makers)
    idx = torch.randint(64, (2, 8))
    losses = {n: makers[n]()(idx, idx).item() for n in ("fast", "plain", "nanogpt")}
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses


def test_colours_of_an_error_are_left_out():
    error = RuntimeError("\x1b[31mno\x1b[0m \x1b[1;4mkernel")
    assert contest.trouble(of_compiled([]), error)["reason"] == "RuntimeError: no kernel"


# ---- in run_all.py


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_plan_of_compilations(quick, tmp_path, monkeypatch):
    """A job for each shape that will be timed, with the options it will be timed with, and of a
    training step for each compiled model; but none for host time, where nothing is compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    planned = plan.planned("cuda", quick, None, False)
    benches = planned.benches(tmp_path, "abacus")
    timed = collections.Counter()
    for *command, _json, _path in (job.command for job in benches):
        i = command.index("--shapes")
        for shape in command[i + 1].split(","):
            timed[(*command[:i], "--shapes", shape)] += 1
    compiled = collections.defaultdict(list)
    jobs_ = planned.compilations(tmp_path, "abacus")
    for job in jobs_:
        head, _, model = " ".join(job.command).partition(" --compile-only")
        compiled[tuple(head.split(" "))].append(model.split())
    assert set(timed) - set(compiled) == {key for key in timed if key[1].endswith("host.py")}
    assert set(compiled) <= set(timed) and len({job.name for job in jobs_}) == len(jobs_)
    for command, given in compiled.items():
        if not command[1].endswith("train_step.py"):
            assert given == [[]]
            continue
        chosen = []
        for one in given:
            argv = [*command[2:], *one, "--device", "cpu"]
            known = train_step.DIMS, train_step.SHAPES, models.BACKENDS, models.PEERS
            o = options.parse(argv, "", *known)
            only = {"backend": o.backends, "peer": o.peers}
            case = Case("train_step", {}, "bfloat16", ("step",))
            record = Record(None, "train_step", {}, only=only, without=o.without)
            everyone = [
                contest.Contender(name, None, kind="backend" if name in models.BACKENDS else "peer")
                for name in models.COMPILED
            ]
            chosen += [c.name for c in record.wanted(case, everyone)]
        assert sorted(chosen) == sorted(models.COMPILED), "each is compiled once"
    assert not plan.planned("cpu", quick, None, False).compilations(tmp_path, "abacus")


@pytest.fixture
def whole_run(tmp_path, monkeypatch):
    """run(planned, *options) -> the report of run_all.py, which must end with exit code 0."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run_all, "described", lambda device, env: {
        "device": "cpu", "device_name": "Abacus 3", "threads": 1, "cpu_capability": "AVX2",
    })  # fmt: skip
    out = tmp_path / "out"

    def run(planned, *argv):
        assert run_all.main(["--out", str(out), "--device", "cpu", *argv], planned) == 0
        return (out / "report.md").read_text()

    return run


def stand_in(tmp_path, name, code):
    """A job that runs a few lines of Python, which find the compiler's cache in `cache`."""
    file = tmp_path / f"{name}.py"
    head = "import os, pathlib\ncache = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
    file.write_text(head + code)
    return jobs.Job(name, (sys.executable, str(file)), stall_s=60.0, resumes=False)


def test_compilations_come_first_and_cost_nothing_when_they_fail(tmp_path, whole_run, monkeypatch):
    """The choices that were timed meanwhile are forgotten, and what was compiled is not."""
    compiles = (
        "assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '1'\n"
        "(cache / 'ab').mkdir()\n"
        "for name in ('code.py', 'k.best_config'): (cache / 'ab' / name).touch()\n"
    )
    looks = (
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "(out / 'seen').write_text(' '.join(p.name for p in cache.rglob('*.*')))\n"
        f"(out / 'threads').write_text(str('TORCHINDUCTOR_COMPILE_THREADS' in os.environ))\n"
    )

    def planned(*args):
        return plan.Plan(
            builds=lambda *a: [], tests=lambda *a: [],
            benches=lambda *a: [stand_in(tmp_path, "bench", looks)],
            compilations=lambda *a: [
                stand_in(tmp_path, "compiles", compiles), stand_in(tmp_path, "fails", "exit(5)"),
            ],
        )  # fmt: skip

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    report = whole_run(planned)
    assert (tmp_path / "seen").read_text() == "code.py"
    assert (tmp_path / "threads").read_text() == "False"
    assert "| fails | skipped |" in report and "exit code 5" in report
    assert "| compiles | ok |" in report
    lines = [line for line in report.splitlines() if line.startswith(("| compiles", "| bench"))]
    assert [line.split()[1] for line in lines] == ["compiles", "bench"]


def test_compiling_ends_in_time_for_the_contests(tmp_path, whole_run):
    """What compiles without end leaves the benchmarks their share."""

    def planned(*args):
        return plan.Plan(
            builds=lambda *a: [], tests=lambda *a: [],
            benches=lambda *a: [stand_in(tmp_path, "bench", "")],
            compilations=lambda *a: [
                stand_in(tmp_path, "endless", "import time\nwhile True: time.sleep(1)")
            ],
        )  # fmt: skip

    report = whole_run(planned, "--minutes", "0.1")
    assert "| endless | skipped |" in report and "| bench | ok |" in report


def test_what_outlasts_its_share_is_ended(tmp_path, whole_run):
    """A search of two minutes in the first script left nothing for the others."""

    def planned(*args):
        endless = stand_in(tmp_path, "endless", "import time\nwhile True: time.sleep(1)")
        return plan.Plan(
            builds=lambda *a: [], tests=lambda *a: [],
            benches=lambda *a: [
                dataclasses.replace(endless, share=0.1, grace_s=0.5), stand_in(tmp_path, "next", "")
            ],
        )  # fmt: skip

    report = whole_run(planned, "--minutes", "0.2")
    assert "| endless | skipped |" in report and "| next | ok |" in report
    on_gpu = plan.planned("cuda", False, None, False).benches(tmp_path, "abacus")
    assert all(job.grace_s == plan.GRACE_S for job in on_gpu)


def test_what_depends_on_the_libraries_is_compiled_after_their_build(tmp_path, whole_run):
    """Which backends a fast model takes depends on them: compiled before, its code is another's."""
    built, seen = tmp_path / "built", tmp_path / "seen"
    wait = f"import time\ntime.sleep(0.5)\nopen({str(built)!r}, 'w').close()"
    look = f"import os\nopen({str(seen)!r}, 'w').write(str(os.path.exists({str(built)!r})))"

    def planned(*args):
        fast = dataclasses.replace(stand_in(tmp_path, "fast", look), after_builds=True)
        return plan.Plan(
            builds=lambda *a: [stand_in(tmp_path, "build", wait)], tests=lambda *a: [],
            benches=lambda *a: [], compilations=lambda *a: [fast],
        )  # fmt: skip

    whole_run(planned)
    assert seen.read_text() == "True"
    fast = [
        job for job in plan.planned("cuda", False, None, False).compilations(tmp_path, "abacus")
        if job.after_builds
    ]  # fmt: skip
    assert fast and all("--backends fast-" in " ".join(job.command) for job in fast)


def test_an_interrupt_ends_what_compiles_and_begins_nothing(tmp_path, whole_run, monkeypatch):
    monkeypatch.setattr(jobs, "stopping", threading.Event())

    def planned(*args):
        endless = [
            stand_in(tmp_path, f"endless-{i}", f"(pathlib.Path({str(tmp_path)!r}) / 'begun-{i}')"
                     ".touch()\nimport time\nwhile True: time.sleep(1)")
            for i in range(40)
        ]  # fmt: skip
        failing = dataclasses.replace(stand_in(tmp_path, "build", ""), command=None)
        return plan.Plan(
            builds=lambda *a: [failing], tests=lambda *a: [], benches=lambda *a: [],
            compilations=lambda *a: endless,
        )  # fmt: skip

    with pytest.raises(TypeError):  # as an interrupt would: in the middle of the first phase
        whole_run(planned)
    assert len(list(tmp_path.glob("begun-*"))) < 40


def test_no_library_is_asked_for_that_is_not_measured(monkeypatch):
    """To ask a backend whether it can serve builds its library."""
    asked = []
    monkeypatch.setattr(kernels, "why_not", lambda name, *rest: asked.append(name))
    shape, cases = SimpleNamespace(N=2, C=8), {}
    for name, options_ in {
        "rehearsal": {"rehearsal": True}, "without": {"without": ["cuda", "triton"]},
    }.items():  # fmt: skip
        record = Record(None, "any", {}, only=ANYBODY, **options_)
        asked.clear()
        harness.backends(gelu.OPS[0], shape, CPU, torch.float32, record)
        cases[name] = list(asked)
    assert cases == {"rehearsal": [], "without": ["cpu", "reference"]}


def test_the_largest_batch_is_searched_on_a_gpu_alone(rehearsal):
    shape = SimpleNamespace(B=2, T=8)
    args = shape, torch.float32, clock.Clock(CPU, True), {}, rehearsal
    with pytest.raises(SystemExit, match="--largest-batch needs a GPU"):
        train_step.measure(*args, largest_batch=True)


def test_left_out_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    argv = ["--device", "cpu", "--without", "eager", "--without", "cpu,liger"]
    parsed = options.parse(argv, "", "N", {"cpu": "8"}, ["cpu"], ["eager", "liger"])
    assert parsed.without == ["eager", "cpu", "liger"], "each adds to those before"
    record = Record(None, "any", {}, only=ANYBODY, without=["eager"])
    case = Case("gelu", {}, "float32", ("forward",))
    everyone = [contest.Contender("eager", None), contest.Contender("liger", None)]
    assert [c.name for c in record.wanted(case, everyone)] == ["liger"]


# ---- the whole step as one graph


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_one():
    """From its first replay on: capturing leaves weights and AdamW as they were."""
    config = Config(block_size=64, vocab_size=512, n_layer=2, n_head=4, n_embd=64)
    torch.manual_seed(0)
    plain = train_step.Model(config)
    idx, targets = torch.randint(512, (2, 4, 64), device="cuda")
    losses = {}
    for graph in (False, True):
        model = models.ours(plain, True).cuda()
        step = train_step.stepper(model, idx, targets, torch.bfloat16, graph)
        losses[graph] = [step().item() for _ in range(4)]
    assert losses[True] == losses[False]
    assert train_step.peak(step, torch.device("cuda")) == step.peak_memory > 0
