"""A run whose steps are replayed as CUDA graphs has the bits of a run without. Without a GPU a list
of operators takes the place of a graph (tools/fake_graphs.py)."""

import contextlib
import math
from functools import partial

import pytest
import torch
from late import ON_GPU, Waits
from runs import TEXT, options
from util import DEVICE, bits_equal

from gpt2.checkpoints import checkpoint
from gpt2.errors import NonFiniteError
from gpt2.kernels import ids
from gpt2.train.start import Trainer

NOT_ON_A_GPU = pytest.mark.skipif(
    ON_GPU, reason="an invalidated capture may leave PyTorch's generator unusable"
)
pytestmark = pytest.mark.usefixtures("without_the_interpreter", "captures")


@pytest.fixture
def trainer_with(tmp_path):
    """Trainers of the same small run."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)

    def trainer_with(**changes):
        changes = {"dropout": 0.1, "fast": True, "device": DEVICE, **changes}
        return Trainer(options(str(path), **changes))

    return trainer_with


def state_of(trainer):
    """Everything that an update changes."""
    optimizer = trainer.work.optimizer
    parts = [p.detach().clone() for p in trainer.model.parameters()]
    for p in trainer.model.parameters():
        parts += [x.clone() for _, x in sorted(optimizer.state[p].items())]
    return parts


def same(a, b):
    return len(a) == len(b) and all(map(bits_equal, a, b))


def steps(trainer, n, evaluated_at=()):
    found = []
    for k in range(n):
        found.append(trainer.train_step())
        if k in evaluated_at:
            found.append(trainer.evaluate(limit=2))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accum": 2, "grad_clip": 0.05},
        {"dtype": "bfloat16", "grad_clip": 0.0},
        {"fast": False},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_the_bits_of_a_run_without_graphs(changes, trainer_with, captures):
    """Losses, learning rates, weights and AdamW's state, with dropout and evaluations between."""
    captured, eager = trainer_with(**changes), trainer_with(cuda_graph=False, **changes)
    evaluated_at = (2, 5, 9)
    got = steps(captured, 12, evaluated_at)
    assert (captures.captures, captures.replays) == (3, 11 + 10 + 5)
    assert got == steps(eager, 12, evaluated_at)
    assert (captures.captures, captures.replays) == (3, 26)
    assert same(state_of(captured), state_of(eager))
    assert len({loss for loss, _ in got[:2]}) == 2


def broken_backward(work, x, y):
    loss = type(work).backward(work, x, y)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("operation not permitted when stream is capturing")
    return loss


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("why", ["compiled", pytest.param("failed", marks=NOT_ON_A_GPU)])
def test_no_update_is_captured_without_its_gradients(why, trainer_with, captures, monkeypatch):
    """Eager gradients are in new memory at each step; a captured update would read the old."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    captured = trainer_with(compile=why == "compiled")
    eager = trainer_with(cuda_graph=False)
    told = contextlib.nullcontext()
    if why == "failed":
        monkeypatch.setattr(captured.work, "backward", partial(broken_backward, captured.work))
        told = pytest.warns(UserWarning, match="no CUDA graph can be captured: RuntimeError")
    with told:
        got = steps(captured, 6)
    assert got == steps(eager, 6) and captures.captures == 0
    assert same(state_of(captured), state_of(eager))
    assert all(p.grad is None for p in captured.model.parameters()), "memory for the evaluation"


def test_gradients_have_one_shape(trainer_with):
    """Those of another shape would take the place of the ones that the captured update reads."""
    trainer = trainer_with()
    x = torch.zeros(3, 16, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"one batch of the options, got \(3, 16\)"):
        trainer.work.gradients(x, x)


def test_evaluation_of_a_ragged_last_batch(trainer_with, captures):
    captured = trainer_with(batch_size=8)
    eager = trainer_with(batch_size=8, cuda_graph=False)
    for _ in range(3):
        assert captured.evaluate() == eager.evaluate()
    assert captures.captures == 2


@pytest.mark.parametrize("step", [0, 1, 4])
def test_not_finite_stops_before_the_update(step, trainer_with, captures):
    """Step 0 is eager, step 1 is captured, and step 4 is replayed."""
    trainer = trainer_with()
    steps(trainer, step)
    bias = trainer.model.transformer["h"][0].mlp.c_fc.bias
    with torch.no_grad():
        bias[3] = math.nan
    before = state_of(trainer)
    with pytest.raises(NonFiniteError, match=rf"step {step + 1} \(batch {step} of seed 1337\)"):
        trainer.train_step()
    assert same(state_of(trainer), before) and trainer.step == step
    with torch.no_grad():
        bias[3] = 0.0
    assert math.isfinite(trainer.train_step()[0])


@pytest.mark.parametrize("again", [False, True], ids=["fresh", "same"])
def test_resume(again, trainer_with, captures, tmp_path):
    """A load replaces the optimizer's tensors: a graph captured before would update the old ones.
    With `again`, the trainer that saved goes on after a load."""
    path, whole = tmp_path / "checkpoint.safetensors", trainer_with()
    want = steps(whole, 9)
    trainer = trainer_with()
    got = steps(trainer, 5)
    progress = {"step": 5, "train_tokens": len(trainer.corpus.train)}
    checkpoint.save(path, trainer.model, trainer.work.optimizer, **progress)
    if again:
        steps(trainer, 3)
    else:
        trainer = trainer_with()
    trainer.load(path, progress)
    got += steps(trainer, 4)
    assert got == want and same(state_of(trainer), state_of(whole))


def test_a_checkpoint_of_a_run_without_graphs(trainer_with, captures, monkeypatch, tmp_path):
    """AdamW's step counts may be on the CPU, and the learning rate a number."""
    path, whole = tmp_path / "checkpoint.safetensors", trainer_with(dtype="float32")
    want = steps(whole, 6)
    with monkeypatch.context() as patch:
        patch.setattr("gpt2.graphs.supports", lambda device: False)
        before = trainer_with(dtype="float32")
    assert before.work.optimizer.param_groups[0]["lr"] == before.options.lr
    steps(before, 3)
    progress = {"step": 3, "train_tokens": len(before.corpus.train)}
    checkpoint.save(path, before.model, before.work.optimizer, **progress)
    trainer = trainer_with(dtype="float32")
    trainer.load(path, progress)
    groups = trainer.work.optimizer.param_groups
    assert all(isinstance(group["lr"], torch.Tensor) and group["capturable"] for group in groups)
    for got, expected in zip(steps(trainer, 3), want[3:], strict=True):
        assert got == pytest.approx(expected, rel=1e-6)  # the learning rate is rounded to float32


@pytest.mark.parametrize("part", ["x", "y"])
def test_bad_ids_are_named_before_a_replay(part, trainer_with, captures, monkeypatch):
    trainer = trainer_with()
    steps(trainer, 3)
    V = trainer.model.config.vocab_size
    draw = type(trainer.corpus.train).batch

    def spoiled(*args):
        x, y = draw(*args)
        (x if part == "x" else y)[1, 2] = V
        return x, y

    monkeypatch.setattr(type(trainer.corpus.train), "batch", spoiled)
    before = state_of(trainer)
    with pytest.raises(ValueError, match=rf"must lie in \[0, {V}\), got {V}"):
        trainer.train_step()
    assert same(state_of(trainer), before)


def test_an_id_that_the_device_finds_is_named(trainer_with, late):
    """Where the loss is read, before NaN in it is reported."""
    trainer = trainer_with(cuda_graph=False)
    V = trainer.model.config.vocab_size
    trainer.work.batch = lambda x, y: (
        torch.full(x.shape, V, device=DEVICE),
        torch.from_numpy(y).to(DEVICE),
    )
    gradients = trainer.work.gradients
    trainer.work.gradients = lambda *batch: (gradients(*batch), late.finish())[0]
    with pytest.raises(ValueError, match=rf"idx must lie in \[0, {V}\), got {V} \(check 1 of"):
        trainer.train_step()
    ids.raise_pending(torch.device(DEVICE), wait=True)


def test_one_wait_in_a_step(trainer_with, late, monkeypatch):
    """The loss and the norm of the gradient, which tolist reads without an operator."""
    trainer = trainer_with(cuda_graph=False)
    steps(trainer, 1)
    batch = trainer.work.batch(*trainer.corpus.train.batch(0, 1, 4, 16))
    with Waits(monkeypatch) as waits:
        trainer.work.gradients(*batch)
        trainer.work.update(1e-3)
    assert waits.found == [] and late.waits == 0
