"""The files with which a run continues, whenever it died: the start, the best weights so far, and
the peak rate for mfu."""

import json
import math
import shutil

import pytest
import torch
from checkpoint_files import rewritten
from runs import TEXT, TINY, options, rows
from safetensors.torch import load_file

from gpt2 import device as machine
from gpt2 import loading
from gpt2.checkpoints import checkpoint, convert
from gpt2.cli import main
from gpt2.errors import InputError, NonFiniteError
from gpt2.train import best
from gpt2.train.start import resume, train
from gpt2.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_the_interpreter")


class Killed(BaseException):
    """Ends a run like kill -9: nothing is saved."""


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return "text.txt"


@pytest.fixture
def kill_at(monkeypatch):
    """A context in which a run dies before the step after this one."""

    def at(step):
        context = monkeypatch.context()
        patch = context.__enter__()
        original = Trainer.train_step

        def train_step(trainer):
            if trainer.step == step:
                raise Killed
            return original(trainer)

        patch.setattr(Trainer, "train_step", train_step)
        return context

    def run(step, act):
        context = at(step)
        try:
            with pytest.raises(Killed):
                act()
        finally:
            context.__exit__(None, None, None)

    return run


def same_checkpoints(a, b):
    a, b = (load_file(path / checkpoint.FILE) for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- before the first checkpoint


@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.full), 3, pytest.param(4, marks=pytest.mark.full)]
)
def test_a_run_that_died_before_its_first_checkpoint_goes_on(step, text, tmp_path, kill_at, capsys):
    """Such a run could neither be resumed nor restarted in its folder."""
    train(options(text, out="whole", dropout=0.1))
    kill_at(step, lambda: train(options(text, out="cut", dropout=0.1)))
    assert not (tmp_path / "cut" / checkpoint.FILE).exists()
    torch.manual_seed(0)
    capsys.readouterr()
    assert main(["train", "--resume", "cut"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("'cut' has no checkpoint yet: the run begins again at step 0\n")
    assert same_checkpoints(tmp_path / "whole", tmp_path / "cut")
    assert [r["step"] for r in rows(tmp_path / "cut")] == [2, 4, 5, 6, 8, 10, 12]


def test_one_that_began_with_a_model_begins_with_it_again(text, tmp_path, kill_at):
    train(options(text, out="first", sample_tokens=0))
    chosen = {"init": "first", "lr": 1e-3, "sample_tokens": 0}
    train(options(text, out="whole", **chosen))
    kill_at(2, lambda: train(options(text, out="cut", **chosen)))
    shutil.copytree("cut", "orphan")
    assert resume("cut") == 0
    assert same_checkpoints(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree("first")
    with pytest.raises(InputError, match=r"init 'first' must still exist, because the run"):
        resume("orphan")


def test_a_diverging_run_can_begin_again_with_another_lr(text, tmp_path):
    with pytest.raises(NonFiniteError):
        train(options(text, out="run", lr=1e30, warmup_steps=0, save_interval=100))
    assert resume("run", lr=1e-3) == 0
    assert math.isfinite(rows(tmp_path / "run")[-1]["train_loss"])


def test_a_checkpoint_that_is_lost_is_no_start(text, tmp_path):
    """A restart would drop the metrics of a run that was already past its first checkpoint."""
    train(options(text, out="run", sample_tokens=0))
    (tmp_path / "run" / checkpoint.FILE).unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="cannot be read"):
        resume("run", steps=20)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


# ---- the best


def scripted(monkeypatch, losses):
    """Scripted validation losses: `losses` by step for eval_batches, and 0.5 for the whole
    split."""
    asked = []

    def evaluate(trainer, limit=0, model=None):
        asked.append((trainer.step, limit, model is not None))
        return losses[trainer.step] if limit else 0.5

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return asked


def kept(folder):
    return {k: best.read(folder)[k] for k in ("step", "val_loss")}


def test_the_best_weights_are_kept(text, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, {3: 3.0, 6: 1.0, 9: 2.0, 12: 1.5})
    weights, write = {}, best.write

    def noted(run, model, *args, step, **kwargs):
        weights[step] = [p.detach().clone() for p in model.parameters()]
        write(run, model, *args, step=step, **kwargs)

    monkeypatch.setattr(best, "write", noted)
    train(options(text, out="run", eval_interval=3, keep_best=True))
    assert list(weights) == [3, 6], "the last evaluation is of other batches"
    assert kept(tmp_path / "run") == {"step": 6, "val_loss": 1.0}
    assert "lowest validation loss over eval_batches 1.0000, after step 6: run/best" in (
        capsys.readouterr().err
    )
    model, tokenizer = loading.load("run/best")
    assert all(map(torch.equal, model.parameters(), weights[6]))
    assert tokenizer.name == "char"
    names = {path.name for path in (tmp_path / "run" / "best").iterdir()}
    assert names == {checkpoint.FILE, "tokenizer.json", "config.json"}
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(("eval_batches", "steps"), [(3, [5, 10, 12]), (0, [5, 10, 12])])
def test_the_last_step_is_measured_as_the_others(eval_batches, steps, text, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, {5: 2.0, 10: 1.0, 12: 0.7})
    train(options(text, out="run", eval_batches=eval_batches, keep_best=True, sample_tokens=0))
    expected = {"step": 12, "val_loss": 0.7} if eval_batches else {"step": 5, "val_loss": 0.5}
    assert kept(tmp_path / "run") == expected
    assert [step for step, *_ in asked] == [*steps, *([12] if eval_batches else [])]


def test_everything_that_reads_a_run_reads_the_best(text, tmp_path, capsys):
    train(options(text, out="run", keep_best=True, sample_tokens=0))
    assert main(["sample", "run/best", "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert main(["eval", "run/best", "--data", text]) == 0
    assert main(["convert", "run/best", "hf", "--to", "hf"]) == 0
    assert convert.read("run/best").format == "run"
    capsys.readouterr()
    tiny = ("--steps", "2", "--batch-size", "2", "--sample-tokens", "0", "--device", "cpu")
    assert main(["train", "--init", "run/best", "--data", text, "--out", "new", *tiny]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "best").iterdir()}
    capsys.readouterr()
    assert main(["train", "--resume", "run/best"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got the best weights of a run: resume the run itself, or --init them" in line
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "best").iterdir()} == before


def test_the_best_so_far_survives_a_resume(text, tmp_path, monkeypatch, kill_at):
    scripted(monkeypatch, {5: 1.0, 10: 2.0, 12: 1.5, 15: 0.9, 16: 3.0})
    kill_at(11, lambda: train(options(text, out="run", keep_best=True, sample_tokens=0)))
    assert resume("run") == 0
    assert kept(tmp_path / "run") == {"step": 5, "val_loss": 1.0}
    (tmp_path / "run" / "best" / f".{checkpoint.FILE}.tmp-x").mkdir()  # a killed writer's
    assert resume("run", steps=16) == 0
    assert kept(tmp_path / "run") == {"step": 15, "val_loss": 0.9}
    assert len(list((tmp_path / "run" / "best").iterdir())) == 3


@pytest.mark.parametrize("broken", [None, "x", -1.0], ids=str)
def test_the_best_is_measured_anew_where_the_batches_are_others(broken, text, tmp_path):
    train(options(text, out="run", keep_best=True, sample_tokens=0))
    file = tmp_path / "run" / "best" / checkpoint.FILE
    lowest = best.read(tmp_path / "run")["val_loss"]
    changes = {"steps": 13} if broken is not None else {"steps": 13, "eval_batches": 1}
    if broken is not None:
        rewritten(file, lambda tensors, description: description.update(val_loss=broken))
    seen, evaluate = [], Trainer.evaluate

    def noted(trainer, limit=0, model=None):
        seen.append((limit, model is not None, evaluate(trainer, limit, model)))
        return seen[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", noted)
        resume("run", **changes)
    limit, of_the_best, loss = seen[0]
    assert of_the_best and limit == changes.get("eval_batches", TINY["eval_batches"])
    assert loss == pytest.approx(lowest) if broken is not None else loss != lowest


def test_nothing_is_kept_unless_it_is_asked_for(text, tmp_path):
    train(options(text, out="run", sample_tokens=0))
    assert not (tmp_path / "run" / "best").exists()
    assert resume("run", steps=15, keep_best=True) == 0
    assert kept(tmp_path / "run")["step"] == 15


def test_a_validation_loss_that_is_not_finite_is_no_best(text, tmp_path, monkeypatch):
    trainer = Trainer(options(text))
    with torch.no_grad():
        trainer.model.transformer["ln_f"].bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the validation loss after step 0 is nan"):
        trainer.evaluate()


# ---- the peak


def test_a_run_keeps_its_peak(text, tmp_path, monkeypatch):
    """After a resume the peak was measured again, and the same speed had another mfu."""
    calls, figures = [], iter([1e9, 3e9, 5e9, 7e9])

    def measured(n, device, dtype):
        calls.append(n)
        return next(figures)

    monkeypatch.setattr(machine, "_measured_flops", measured)
    train(options(text, out="run", sample_tokens=0))
    peak = json.loads((tmp_path / "run" / "config.json").read_text())["peak"]
    assert peak["flops"] == 1e9 and peak["source"].startswith("0.001 TFLOP/s, measured on float32")
    resume("run", steps=14)
    assert len(calls) == 1
    per_flop = {round(r["mfu"] / r["tokens_per_s"] / 1e-9) for r in rows(tmp_path / "run")}
    assert len(per_flop) == 1
    resume("run", steps=16, dtype="bfloat16")
    assert len(calls) == 2, "the peak of another dtype is another"
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    del settings["peak"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    resume("run", steps=17)
    assert len(calls) == 3, "a run of an older version has none"


def test_the_peak_is_the_best_of_a_second(monkeypatch):
    """The best of six products differed by a third between runs."""
    clock, products = [0.0], []

    def compute():
        products.append(len(products))
        clock[0] += 0.02 if len(products) == 37 else 0.025 + 0.01 * (len(products) % 3)

    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    assert machine._best(compute, 1.5) == pytest.approx(0.02)
    assert clock[0] >= 1.5 and len(products) > 37
    products.clear()
    machine._best(compute)
    assert len(products) == 6


def test_a_peak_tells_whose_it_is():
    cpu = torch.device("cpu")
    found = machine.describe(cpu, torch.bfloat16)
    assert found.endswith(f", bfloat16, {torch.get_num_threads()} threads")
    assert found != machine.describe(cpu, torch.float32)
    assert machine.peak_flops(cpu, torch.float32).machine == machine.describe(cpu, torch.float32)
