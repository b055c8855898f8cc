"""A whole model under autocast: the residual stream stays float32, and errors do not grow with
depth."""

import pytest
import torch
from backends import why_no_cpu_kernels
from util import DEVICE, assert_close_to

from gpt2 import Config, Model, kernels

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUICK = ((12, "fp16"), (24, "bf16"))  # layers and dtypes that run without --full
T = 16


def model_of(n_layer, n_embd=32, vocab_size=40):
    torch.manual_seed(n_layer)
    model = Model(Config(T, vocab_size, n_layer, 2, n_embd)).to(DEVICE)
    with torch.no_grad():  # published weights are larger than fresh ones
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(vocab_size, (2, T), device=DEVICE)
    return model, idx


def results(model, idx, dtype=None):
    """Logits, loss and every gradient."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        logits, loss = model(idx, idx.roll(-1, 1), return_logits=True)
    loss.backward()
    return logits, loss, [p.grad for p in model.parameters()]


def check_errors(model, idx, dtype, backend):
    """At most twice plain PyTorch's error, in logits and gradients."""
    plain = results(model, idx, HALVES[dtype])
    model.fast = True
    with kernels.use(backend):
        fast = results(model, idx, HALVES[dtype])
    model.fast = False
    exact = results(model.double(), idx)
    assert_close_to(exact[0], fast[0], plain[0], "logits", factor=2)
    together = [torch.cat([g.flatten() for g in of[2]]) for of in (exact, fast, plain)]
    assert_close_to(*together, "gradients", factor=2)


@pytest.mark.parametrize(
    "n_layer, dtype",
    [
        pytest.param(n, dtype, marks=[] if (n, dtype) in QUICK else pytest.mark.full)
        for n in (12, 24, 48)
        for dtype in HALVES
    ],
)
@pytest.mark.parametrize("on", ["gpu", "cpu"])
def test_errors_do_not_grow_with_depth(on, n_layer, dtype):
    """With a 16-bit stream the errors of 12, 24 and 48 layers were 2.3, 3.0 and 4.3 times plain
    PyTorch's."""
    if on != DEVICE.replace("cuda", "gpu"):
        pytest.skip(f"the tests' tensors are not on a {on}")
    if on == "cpu" and (reason := why_no_cpu_kernels("")):
        pytest.skip(reason)
    check_errors(*model_of(n_layer), dtype, "triton" if on == "gpu" else "cpu")


def test_errors_of_a_shallow_model(accelerated):
    check_errors(*model_of(2), "bf16", accelerated)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fast", [False, True])
def test_the_stream_is_float32(dtype, fast):
    model, idx = model_of(3, n_embd=16)
    model.fast, seen = fast, []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    results(model, idx, HALVES[dtype])
    assert [(x.dtype, s.dtype) for x, s in seen] == [(HALVES[dtype], torch.float32)] * 3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fast", [False, True])
def test_weights_of_16_bits_keep_a_stream_of_16_bits(dtype, fast):
    model, idx = model_of(2)
    model.to(HALVES[dtype]).fast = fast
    seen = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    for autocast in (None, HALVES[dtype]):
        results(model, idx, autocast)
    assert all(s.dtype == HALVES[dtype] for _, s in seen)


def test_a_stream_beyond_the_numbers_of_float16(accelerated):
    """GPT-2's stream exceeds 65504 in a few columns; only with fast=True the loss was NaN."""
    model, idx = model_of(2)
    with torch.no_grad():
        model.transformer.wpe.weight[:, 0] = 1e5
        model.transformer.ln_f.weight[0] = 0.0
        for block in model.transformer.h:
            block.ln_1.weight[0] = block.ln_2.weight[0] = 0.0
    _, want, _ = results(model, idx)
    model.fast = True
    with kernels.use(accelerated):
        _, loss, gradients = results(model, idx, torch.float16)
    assert torch.allclose(loss, want, atol=0.02) and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("fast", [False, True])
def test_gradients_scaled_for_float16(fast):
    """GradScaler's loss: a micro-batch without targets leaves the gradients unchanged."""
    model, idx = model_of(2)
    model.fast = fast
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    grads = []
    for targets in (idx, torch.full_like(idx, -1), torch.full_like(idx, -100)):
        with torch.autocast(DEVICE, torch.float16):
            _, loss = model(idx, targets)
        assert loss.isnan() == (targets is not idx)
        scaler.scale(loss).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for later in grads[1:]:
        assert all(map(torch.equal, later, grads[0]))
