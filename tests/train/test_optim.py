"""AdamW's parameter groups and the learning rate of every step."""

import math
from itertools import pairwise

import pytest
import torch

from gpt2.config import Config
from gpt2.model import Model
from gpt2.train import optim

SCHEDULE = {"steps": 100, "warmup_steps": 10, "lr": 1.0, "min_lr": 0.1}


def test_matrices_decay_and_vectors_do_not():
    model = Model(Config(8, 11, 2, 2, 8))
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or ".ln_" in name
        assert decay.pop(id(parameter)) == (0.0 if vector else 0.1), name
    assert not decay
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_a_step_is_adamw_by_its_formula_and_updates_the_tied_weight_once():
    model = Model(Config(8, 11, 1, 1, 8)).double()
    optimizer = optim.adamw(model, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    weight, bias = model.lm_head.weight, model.transformer["ln_f"].bias
    expected = {}
    for p, decay in ((weight, 0.1), (bias, 0.0)):
        expected[p], m, v = p.detach().clone(), 0.0, 0.0
        for t, g in enumerate((0.5, -2.0), 1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            step = m / (1 - 0.8**t) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
            expected[p] = expected[p] * (1 - 0.01 * decay) - 0.01 * step
    for g in (0.5, -2.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.step()
    for p in (weight, bias):
        torch.testing.assert_close(p.detach(), expected[p], rtol=1e-12, atol=1e-12)
    assert weight is model.transformer["wte"].weight


def test_fused_on_cpu_and_frozen_parameters_left_out():
    model = Model(Config(8, 11, 1, 1, 8))
    model.transformer["wpe"].weight.requires_grad = False
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    assert optimizer.defaults["fused"]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert id(model.transformer["wpe"].weight) not in held


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (10 + 89 // 2, 0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89))),
        (99, 0.1),
        (1000, 0.1),
    ],
)
def test_learning_rate(step, expected):
    assert optim.learning_rate(step, **SCHEDULE) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_never_jumps():
    rates = [optim.learning_rate(k, **SCHEDULE) for k in range(100)]
    assert all(abs(a - b) <= 0.1 + 1e-12 for a, b in pairwise(rates))
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (1, 1), (5, 5), (5, 10), (2, 1)])
def test_learning_rate_of_short_runs(steps, warmup_steps):
    for step in range(steps):
        rate = optim.learning_rate(step, steps=steps, warmup_steps=warmup_steps, lr=1.0, min_lr=0.1)
        assert 0.1 <= rate <= 1.0
