"""One step of training: accumulation, clipping, non-finite losses, bfloat16."""

import math

import pytest
import torch
from runs import TEXT, options

from gpt2.errors import NonFiniteError
from gpt2.train.start import Trainer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("masked", [False, True], ids=["all-targets", "uneven-mask"])
def test_accumulation_equals_one_big_batch(masked, text):
    """A mean of means would weight a window with few targets as much as a full one."""
    grads, losses = [], []
    for batch_size in (8, 2, 3):  # one pass, four, and a ragged three
        trainer = Trainer(options(text, batch_size=batch_size))
        trainer.model.double()
        x, y = map(torch.from_numpy, trainer.corpus.train.batch(0, 0, 8, 16))
        if masked:
            for row in range(8):
                y[row, 2 * row + 1 :] = -1
        losses.append(trainer.work.backward(x, y).item())
        grads.append([p.grad for p in trainer.model.parameters()])
    for i in (1, 2):
        assert losses[i] == pytest.approx(losses[0], rel=1e-6)
        for a, b in zip(grads[0], grads[i], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(g.abs().sum() > 0 for g in grads[0])


def test_accumulation_draws_the_same_windows(text):
    seen = []
    for changes in ({"batch_size": 4, "grad_accum": 2}, {"batch_size": 8, "grad_accum": 1}):
        trainer = Trainer(options(text, **changes))
        trainer.train_step()
        seen.append(weights(trainer))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stops_before_the_update(where, value, text, tmp_path, monkeypatch):
    trainer = Trainer(options(text))
    trainer.train_step()
    before = weights(trainer)
    original = trainer.work.backward

    def broken(x, y):
        loss = original(x, y)
        if where == "loss":
            return loss * value
        trainer.model.lm_head.weight.grad[3, 1] = value
        return loss

    monkeypatch.setattr(trainer.work, "backward", broken)
    with pytest.raises(NonFiniteError, match=r"step 2 \(batch 1 of seed 1337\)"):
        trainer.train_step()
    assert all(map(torch.equal, before, weights(trainer)))
    assert trainer.step == 1


def test_gradient_is_clipped_to_the_norm_asked_for(text, monkeypatch):
    norms = {}
    for clip in (0.0, 0.01):
        trainer = Trainer(options(text, grad_clip=clip))
        step = trainer.work.optimizer.step
        monkeypatch.setattr(
            trainer.work.optimizer,
            "step",
            lambda clip=clip, trainer=trainer, step=step: (
                norms.update({clip: _norm(trainer.model)}),
                step(),
            ),
        )
        trainer.train_step()
    assert norms[0.0] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def _norm(model) -> float:
    return math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))


def test_bfloat16_learns_as_float32_does(text):
    """Under autocast the weights stay float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(options(text, dtype=dtype))
        losses[dtype] = [trainer.train_step()[0] for _ in range(4)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.03)
    assert losses["bfloat16"] != losses["float32"]
