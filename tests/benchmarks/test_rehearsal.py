"""The first phase of run_all.py: every script compiles its torch.compile contenders
(--compile-only), in parallel, before anything is timed."""

import collections
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gelu
import generate
import pytest
import torch
import train_step
from bench import (
    clock,
    contenders,
    harness,
    models,
    options,
)
from bench.result_file import Case, Record
from bench.run import (
    plan,
)
from processes import ROOT

from gpt2 import Config, kernels

CPU = torch.device("cpu")
ANYBODY = {"backend": None, "peer": None}


@pytest.fixture
def rehearsal(monkeypatch):
    """A record that must stay empty in a rehearsal, and a clock that must not run."""
    monkeypatch.setattr(clock.Clock, "__call__", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(Record, "_write", lambda *args: pytest.fail("written"))
    return Record(Path("unwritten.json"), "any", {}, only=ANYBODY, rehearsal=True)


def of_compiled(calls, name="compiled", **options):
    """A contender that records its calls, and whether they need a gradient."""

    def call(x):
        calls.append((name, torch.is_grad_enabled()))
        return torch.nn.functional.gelu(x, approximate="tanh")

    return contenders.Contender(name, call, **options)


def test_the_compiled_alone_run_forward_and_backward(rehearsal):
    """They run as they will be timed, so that the same code is compiled; errors are reported
    later."""
    calls = []

    def failing(x):
        raise RuntimeError("not today")

    def peers(device):
        yield contenders.Contender("broken", failing, compiles=True)
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
    """It does not measure the machine's limits, and leaves no file."""
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
    assert contenders.trouble(of_compiled([]), error)["reason"] == "RuntimeError: no kernel"


# ---- in run_all.py


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_plan_of_compilations(quick, tmp_path, monkeypatch):
    """One job per timed shape, with the same options, and one per compiled model of a training
    step; none for host time, which compiles nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    planned = plan.planned("cuda", quick, None, tmp_path, "abacus")
    benches = planned.benches
    timed = collections.Counter()
    for *command, _json, _path in (job.command for job in benches):
        i = command.index("--shapes")
        for shape in command[i + 1].split(","):
            timed[(*command[:i], "--shapes", shape)] += 1
    compiled = collections.defaultdict(list)
    jobs_ = planned.compilations
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
                contenders.Contender(
                    name, None, kind="backend" if name in models.BACKENDS else "peer"
                )
                for name in models.COMPILED
            ]
            chosen += [c.name for c in record.wanted(case, everyone)]
        assert sorted(chosen) == sorted(models.COMPILED), "each is compiled once"
    assert not plan.planned("cpu", quick, None, tmp_path, "abacus").compilations


def test_no_library_is_asked_for_that_is_not_measured(monkeypatch):
    """Asking a backend whether it is available builds its library."""
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
    everyone = [contenders.Contender("eager", None), contenders.Contender("liger", None)]
    assert [c.name for c in record.wanted(case, everyone)] == ["liger"]


# ---- the whole step as one graph


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_one():
    """From the first replay on: capturing leaves weights and AdamW unchanged."""
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
