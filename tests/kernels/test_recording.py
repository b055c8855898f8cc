"""Recorded calls: a replay gives the bits of the Python code.

Triton's launches are recorded in another process, with a driver that launches nothing. On a GPU the
tests of the ops and of training replay them, too.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from inputs import tensor
from recorded import CALLS, CASES, check_replay, leaf, recorded
from torch.utils._python_dispatch import TorchDispatchMode
from util import DEVICE, bits_equal

from gpt2 import Config, Model, kernels
from gpt2.block import Block
from gpt2.kernels import autograd, dispatch, recording

pytestmark = [pytest.mark.cpu_kernels, pytest.mark.usefixtures("replaying")]


@pytest.fixture
def in_python(monkeypatch):
    """The autograd functions that ran in Python, by name."""
    ran = []

    def call(function, *args, call=autograd.call):
        ran.append(function.__name__)
        return call(function, *args)

    monkeypatch.setattr(autograd, "call", call)
    monkeypatch.setattr("gpt2.kernels.block.call", call)
    return ran


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "expanded"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case, spread, in_python):
    function = getattr(kernels, case.partition("-")[0])
    with kernels.use("cpu"):
        check_replay(function, CASES[case], spread=spread)
    # Every call of the undecorated form, and those of the op until it was recorded
    assert len(in_python) == 2 * CALLS + 3


@pytest.mark.parametrize("case", ["causal_attention_qkv", "linear_cross_entropy", "layer_norm"])
def test_autocast(case, in_python):
    function = getattr(kernels, case)
    with kernels.use("cpu"):
        check_replay(function, CASES[case], dtype=torch.bfloat16)
    assert len(in_python) == 2 * CALLS + 3


def test_autocast_is_part_of_the_kind():
    qkv = tensor(2, 9, 96)
    with kernels.use("cpu"):
        for i in range(4 * CALLS):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=i % 2 == 0):
                y = kernels.causal_attention_qkv(qkv, 2)
            assert y.dtype == (torch.float32 if i % 2 else torch.bfloat16)


def test_gradients_of_some_inputs():
    """A block computes only the gradients that are asked for."""
    block = Block(Config(9, 65, 1, 2, 32)).to(DEVICE)
    x, s = leaf(2, 9, 32), leaf(2, 9, 32)
    every = (x, s, *block.parameters())
    with kernels.use("cpu"):
        for i in range(6 * CALLS):
            y, s2 = block(x, s, kernels)
            asked = slice(0 if i % 2 else 1, None, (i + 1) % 3 + 1)
            found = torch.autograd.grad((y.sum(), s2.square().sum()), every[asked])
            with recording.paused():
                y, s2 = block(x, s, kernels)
                expected = torch.autograd.grad((y.sum(), s2.square().sum()), every)
            assert all(map(bits_equal, found, expected[asked])), i


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_options_of_a_loss(name, reduction, in_python):
    options = {"reduction": reduction, "label_smoothing": 0.25, "ignore_index": -1}

    def make():
        *given, targets = CASES[name]()
        return *given, targets.masked_fill(targets == -100, -1)

    with kernels.use("cpu"):
        check_replay(getattr(kernels, name), make, options)
    assert len(in_python) == 2 * CALLS + 3


def facts(x, option=None):
    """What Python code may depend on, as a tensor."""
    found = [
        x.dim(), x.shape[0], x.stride(0), x.data_ptr() % 16, x.dtype.itemsize, x.requires_grad,
        torch.is_grad_enabled(), torch.is_autocast_enabled(DEVICE),
        torch.get_autocast_dtype(DEVICE) == torch.float16, dispatch.forced() == "cpu",
        torch.backends.mkldnn.enabled, 1 if option is None else len(repr(option)), option == "bc",
        option == 3,
    ]  # fmt: skip
    return torch.stack([torch.full((), float(fact)) for fact in found])


def test_every_kind_of_call_has_its_own_recording():
    """Calls alternate that differ in one thing."""
    x = torch.ones(4, 4)
    given = [
        (x,), (x[:3],), (x[0],), (torch.ones(8, 8)[:4, :4],), (x.t()[:, :3],), (x[:, 1:],),
        (x.double(),), (x.clone().requires_grad_(),),
        *((x, option) for option in (1, 3, 1.5, True, "a", "bc", "b" * 20, float("nan"))),
    ]  # fmt: skip
    contexts = [
        torch.no_grad,
        lambda: torch.autocast(DEVICE, torch.bfloat16),
        lambda: torch.autocast(DEVICE, torch.float16),
        lambda: kernels.use("cpu"),
        lambda: kernels.use("reference"),
        lambda: torch.backends.mkldnn.flags(enabled=False),
    ]
    kinds = [(contextlib.nullcontext, args) for args in given]
    kinds += [(context, (x,)) for context in contexts]
    with recorded(facts) as call:
        for round in range(CALLS + 3):
            for context, args in kinds:
                with context():
                    assert torch.equal(call(*args), facts(*args)), (round, context, args)


def test_one_tensor_as_two_arguments():
    """q, k and v may be one tensor, and so may the gradients of two results."""
    one = [leaf(1, 5, 2, 16)] * 3
    with kernels.use("cpu"):
        check_replay(kernels.causal_attention, lambda: one)
        check_replay(kernels.causal_attention, CASES["causal_attention"])

        def both(run, same):
            args = CASES["add_layer_norm"]()
            outputs = run(*args)
            first = torch.randn_like(outputs[0])
            second = first if same else torch.randn_like(first)
            return torch.autograd.grad(outputs, args, (first, second))

        for same in (False, True) * 3 * CALLS:
            found = []
            for run in (kernels.add_layer_norm, kernels.add_layer_norm.__wrapped__):
                torch.manual_seed(0)
                found.append(both(run, same))
            assert all(map(bits_equal, *found)), same


def model_steps(model, steps, autocast=None, targets_only=False):
    """The losses of some steps, and all gradients, which accumulate over every two of them."""
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        idx, targets = torch.randint(model.config.vocab_size, (2, 2, 16), device=DEVICE)
        targets[0, :3] = -1
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(idx, targets)[1]
        loss.backward()
        found.append(loss.detach())
        if step % 2:
            found += [p.grad for p in model.parameters() if p.grad is not None]
            model.zero_grad()
    return found


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("change", ["", "dropout", "frozen", "single ops"])
def test_steps_of_a_model(change, autocast, in_python):
    model = Model(Config(16, 65, 3, 2, 32, dropout=0.1 if change == "dropout" else 0.0), fast=True)
    model = model.to(DEVICE)
    if change == "frozen":
        for name, p in model.named_parameters():
            p.requires_grad_("c_attn" not in name and "ln_1" not in name)
    if change == "single ops":
        model.transformer.h[1].mlp.register_forward_hook(lambda *args: None)
    with kernels.use("cpu"):
        ours = model_steps(model, 8, autocast)
        ran = len(in_python)
        model_steps(model, 2, autocast)
        assert len(in_python) == ran, "the last steps are replayed"
        model.zero_grad()
        with recording.paused():
            assert all(map(bits_equal, ours, model_steps(model, 8, autocast)))


def test_parts_of_autograd():
    """Second derivatives, a second backward, changed tensors, hooks on saved tensors."""
    with kernels.use("cpu"):
        for _ in range(CALLS + 1):
            x, weight, bias = CASES["layer_norm"]()
            y = kernels.layer_norm(x, weight, bias)
            (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            expected = torch.autograd.grad(
                F.layer_norm(x, (32,), weight, bias).pow(3).sum(), x, create_graph=True
            )[0]
            ddx = torch.autograd.grad(dx.square().sum(), x)[0]
            wanted = torch.autograd.grad(expected.square().sum(), x)[0]
            torch.testing.assert_close(ddx, wanted, rtol=1e-3, atol=1e-2)

            y = kernels.layer_norm(x, weight, bias)
            first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
            assert bits_equal(torch.autograd.grad(y.sum(), x)[0], first)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                y.sum().backward()

            y = kernels.layer_norm(x, weight, bias)
            with torch.no_grad():
                x += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

            packed = []

            def pack(x, packed=packed):
                packed.append(x.shape)
                return x.clone(memory_format=torch.contiguous_format)

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = kernels.layer_norm(x, weight, bias)
            assert len(packed) == 4
            torch.testing.assert_close(
                torch.autograd.grad(y.sum(), weight)[0], F.layer_norm(x, (32,)).sum((0, 1))
            )


def test_checkpointing_across_a_recording():
    """The first forward may run in Python and its repetition be replayed."""
    with kernels.use("cpu"):
        found = []
        for _ in range(2 * CALLS):
            torch.manual_seed(0)
            args = CASES["add_layer_norm"]()
            y, s = torch.utils.checkpoint.checkpoint(
                kernels.add_layer_norm, *args, use_reentrant=False
            )
            found.append(torch.autograd.grad((y * s).sum(), args))
        for gradients in found[1:]:
            assert all(map(bits_equal, found[0], gradients))


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def test_who_must_see_python(in_python):
    """Modes, transforms, subclasses, forward-mode derivatives and torch.compile never get a replay,
    however often the same call was recorded before."""
    x = leaf(3, 8)
    with kernels.use("cpu"):
        for _ in range(CALLS + 1):
            kernels.gelu(x)
        ran = len(in_python)
        kernels.gelu(x)
        assert len(in_python) == ran
        with Watching() as mode:
            kernels.gelu(x)
        assert len(in_python) == ran + 1 and mode.ops
        kernels.gelu(x.as_subclass(Own))
        assert len(in_python) == ran + 2
        with torch.inference_mode():
            kernels.gelu(torch.ones(3, 8, device=DEVICE))
        assert len(in_python) == ran + 3
    x = x.detach()
    reference = F.gelu(x, approximate="tanh")
    for _ in range(CALLS + 1):
        kernels.gelu(x)
    torch.testing.assert_close(torch.func.vmap(kernels.gelu)(x), reference)
    tangent = torch.ones_like(x)
    _, found = torch.func.jvp(kernels.gelu, (x,), (tangent,))
    expected = torch.func.jvp(lambda x: F.gelu(x, approximate="tanh"), (x,), (tangent,))[1]
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(kernels.gelu(dual)).tangent
        torch.testing.assert_close(got, expected)
    negated = torch.complex(x, x).conj().imag  # not yet in memory
    assert negated.is_neg()
    torch.testing.assert_close(kernels.gelu(negated), F.gelu(-x, approximate="tanh"))
