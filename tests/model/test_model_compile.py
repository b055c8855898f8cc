"""A model under autocast, activation checkpointing and torch.compile."""

import pytest
import torch
from late import refused
from small_models import SMALL, ids, loss_and_gradients, model_in
from util import DEVICE, bits_equal, launches

from gpt2 import Config, kernels


def test_autocast(accelerated):
    """Parameters stay float32, kernels see bfloat16, gradients come back in float32."""
    model, idx = model_in(fast=True), ids(2, 20)
    with kernels.use(accelerated), torch.autocast(DEVICE, torch.bfloat16):
        logits, _ = model(idx)
        _, loss = model(idx, idx)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    model.fast = False
    assert loss.item() == pytest.approx(model(idx, idx)[1].item(), rel=0.02)


def test_activation_checkpointing(accelerated):
    from torch.utils.checkpoint import checkpoint

    model = model_in(Config(**{**vars(SMALL), "dropout": 0.1}), fast=True)
    idx = ids(2, 20)
    with kernels.use(accelerated):
        want = loss_and_gradients(model, idx, idx)
        for block in model.transformer.h:
            forward = block.forward
            block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
        got = loss_and_gradients(model, idx, idx)
    assert bits_equal(want[0], got[0])
    assert all(bits_equal(want[1][name], got[1][name]) for name in want[1])


@pytest.mark.long
@pytest.mark.no_poison
@pytest.mark.usefixtures("slow_when_emulated")
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.full)])
def test_compile_has_no_graph_break(dropout, accelerated):
    """fullgraph=True raises at a break. Forward, loss and gradients equal the eager model's."""
    torch._dynamo.reset()
    model = model_in(Config(**{**vars(SMALL), "dropout": dropout}), fast=True)
    # Inductor takes half a minute on a GPU: run once, where its results are compared.
    inductor = DEVICE == "cuda" and dropout == 0.0
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    idx = ids(2, 20)
    with kernels.use(accelerated), launches() as launched:
        want = loss_and_gradients(model, idx, idx)
        eager = len(launched)
        _, loss = compiled(idx, idx)
        model.zero_grad()
        loss.backward()
    assert len(launched) == 2 * eager, "the compiled graph runs the same kernels"
    if dropout == 0.0:
        assert torch.allclose(loss, want[0], rtol=1e-6)
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, want[1][name], atol=1e-6), name


@pytest.mark.no_poison
def test_compile_of_the_fallback():
    """If no kernel is available, the compiled model is plain PyTorch, and gives the reason while
    tracing."""
    torch._dynamo.reset()
    model, idx = model_in(fast=True), ids(2, 20)
    with kernels.use("reference"):
        want = model(idx, idx)[1]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(idx, idx)[1], want)


@pytest.mark.no_poison
def test_compiled_model_still_names_bad_ids(accelerated):
    torch._dynamo.reset()
    model = model_in(fast=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    idx = ids(1, 5)
    with kernels.use(accelerated):
        compiled(idx)
        idx[0, 2] = 65
        with refused(r"idx must lie in \[0, 65\), got 65"):
            compiled(idx)
