"""The ops as PyTorch sees them: opcheck, torch.compile, autocast, checkpointing, devices."""

import itertools

import pytest
import torch
from inputs import every_op, tensor
from util import DEVICE, as_tuple, bits_equal, launches

from gpt2 import kernels
from gpt2.kernels import raw_ops, reference

OPS = list(every_op())


def as_tensor(result):
    return torch.cat([y.flatten().float() for y in result]) if type(result) is tuple else result


@pytest.mark.parametrize("op", OPS)
@pytest.mark.no_poison
@pytest.mark.usefixtures("slow_when_emulated")
def test_compile_has_no_graph_break(op, accelerated):
    torch._dynamo.reset()
    call, inputs = every_op()[op]
    leaves = [x.detach().requires_grad_() for x in inputs]
    with kernels.use(accelerated):
        want = as_tensor(call(*leaves))
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        got = as_tensor(compiled(*leaves))
        assert torch.allclose(got, want, rtol=1e-6)
        pairs = zip(
            torch.autograd.grad(got.square().sum(), leaves),
            torch.autograd.grad(want.square().sum(), leaves),
            strict=True,
        )
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.triton
@pytest.mark.no_poison
def test_gelu_alone_is_left_to_the_compiler():
    torch._dynamo.reset()
    with launches() as launched:
        torch.compile(kernels.gelu, fullgraph=True, backend="aot_eager")(tensor(3))
    assert not launched


RAW = torch.ops.gpt2_kernels


def raw_calls():
    """Arguments of every raw op, over a grid of strides."""
    B, T, H, D, N, C, V = 2, 5, 2, 16, 6, 17, 9
    f32 = torch.float32
    lse, seed = tensor(B, H, T), torch.tensor([3], device=DEVICE)
    targets = torch.randint(V, (N,), device=DEVICE)
    layouts = (
        lambda *s: tensor(*s),
        lambda *s: tensor(s[0], *[2 * n for n in s[1:2]], *s[2:])[:, ::2][: s[0]],
        lambda *s: tensor(*s).transpose(0, 1).contiguous().transpose(0, 1),
    )
    for make in layouts:
        q, k, v, o, do = (make(B, T, H, D) for _ in range(5))
        for p, s in ((0.0, None), (0.5, seed)):
            yield RAW.attention_fwd, (q, k, v, 0.25, p, s)
            yield RAW.attention_bwd, (do, q, k, v, o.contiguous(), lse, 0.25, p, s)
        qkv, do3 = make(B, T, 3 * H * D), make(B, T, H * D)
        yield RAW.attention_qkv_fwd, (qkv, H, 0.25, 0.0, None)
        yield RAW.attention_qkv_bwd, (do3, qkv, tensor(B, T, H * D), lse, H, 0.25, 0.0, None)
        x, r, dy, w = make(N, C), make(N, C), make(N, C), tensor(C)
        norm_stats = tensor(2, N)
        yield RAW.layer_norm_fwd, (x, w, w, 1e-5)
        yield RAW.add_layer_norm_fwd, (x, r, w, w, 1e-5)
        for ds in (None, r):
            yield RAW.layer_norm_bwd, (dy, ds, x, w, norm_stats)
        yield RAW.mixed_layer_norm_bwd, (dy.bfloat16(), r, x, w, norm_stats)
        yield RAW.add_layer_norm_fwd, (x.bfloat16(), r, w, w, 1e-5)
        yield RAW.gelu_fwd, (x,)
        yield RAW.gelu_bwd, (dy, x)
        yield RAW.bias_gelu_fwd, (x, w)
        yield RAW.bias_gelu_bwd, (dy, x, w)
        logits, stats = make(N, V), torch.zeros(2, N, device=DEVICE, dtype=f32)
        yield RAW.cross_entropy_fwd, (logits, targets, -1, 0.1)
        yield RAW.cross_entropy_bwd, (tensor(N), logits, targets, stats, -1, 0.1)
        yield RAW.cross_entropy_bwd_, (tensor(N), tensor(N, V), targets, stats, -1, 0.1)
        for needed in itertools.product((True, False), repeat=2):
            options = (targets, -1, 0.1, *needed)
            yield RAW.linear_cross_entropy_fwd, (x, tensor(V, C), *options)
            yield RAW.linear_cross_entropy_bwd, (x, tensor(V, C), tensor(N), *options)


@pytest.mark.no_poison
@pytest.mark.usefixtures("slow_when_emulated")
@pytest.mark.filterwarnings("ignore")
def test_raw_ops_pass_opcheck(accelerated):
    """Schema, fake implementation (shapes, strides, dtypes) and tracing of every raw op."""
    seen = set()
    for op, args in raw_calls():
        torch.library.opcheck(op.default, (*args, accelerated))
        seen.add(op.default.name())
    ids = torch.tensor([[0, 3], [2, 1]], device=DEVICE)
    torch.library.opcheck(RAW.check_ids.default, (ids, "ids", 4, None))
    torch.library.opcheck(RAW.check_ids.default, (ids.t(), "ids", 4, None))
    seen.add(RAW.check_ids.default.name())
    # in test_decode_attention.py, test_linear_few_rows.py and generate/test_decoding.py
    seen |= {op.default.name() for op in (RAW.decode_attention, RAW.linear, RAW.decode_layers)}
    registered = {
        f"gpt2_kernels::{schema.name.partition('::')[2]}"
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("gpt2_kernels::")
    }
    assert seen == registered


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(op, dtype, accelerated):
    """Products, including those of attention, have the autocast dtype; other ops keep the dtype of
    their inputs, as in PyTorch. Gradients have the dtype of their inputs."""
    call, inputs = every_op()[op]
    leaves = [x.detach().requires_grad_() for x in inputs]
    leaves[0] = leaves[0].to(torch.float32).detach().requires_grad_()
    with kernels.use(accelerated), torch.autocast(DEVICE, dtype):
        result = call(*leaves)
    for y in result if type(result) is tuple else (result,):
        assert y.dtype == (dtype if "attention" in op else torch.float32)
    as_tensor(result).square().sum().backward()
    assert all(x.grad.dtype == x.dtype for x in leaves)
    with kernels.use("reference"):
        exact = as_tensor(call(*leaves))
    assert torch.allclose(as_tensor(result).float(), exact.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes_without_autocast(op, accelerated):
    """bf16 activations with fp32 weights are supported. Activations of two dtypes are not, except a
    float32 stream with a 16-bit branch."""
    call, inputs = every_op()[op]
    mixed = [x.bfloat16() if i == 0 else x for i, x in enumerate(inputs)]
    second_is_activation = op == "causal_attention"
    with kernels.use(accelerated):
        if second_is_activation:
            with pytest.raises(TypeError, match=r"dtype torch.bfloat16, got torch.float32"):
                call(*mixed)
        else:
            y, *stream = as_tuple(call(*mixed))
            assert y.dtype == (torch.float32 if "cross_entropy" in op else torch.bfloat16)
            assert all(s.dtype == torch.float32 for s in stream)


@pytest.mark.parametrize("op", OPS)
def test_selective_checkpointing(op, accelerated):
    from torch.utils.checkpoint import checkpoint

    call, inputs = every_op()[op]
    leaves = [x.detach().requires_grad_() for x in inputs]
    with kernels.use(accelerated):
        want = torch.autograd.grad(as_tensor(call(*leaves)).square().sum(), leaves)
        result = checkpoint(lambda *a: as_tensor(call(*a)), *leaves, use_reentrant=False)
        got = torch.autograd.grad(result.square().sum(), leaves)
    assert all(map(bits_equal, want, got))


@pytest.mark.parametrize("op", OPS)
def test_functional_reference_agrees(op, accelerated):
    """The public op on the reference backend is the function of that name in reference.py."""
    call, inputs = every_op()[op]
    assert getattr(reference, op).__name__ == getattr(kernels, op).__name__
    with kernels.use("reference"):
        a = as_tensor(call(*inputs))
    with kernels.use(accelerated):
        b = as_tensor(call(*inputs))
    assert torch.allclose(a, b, atol=1e-4)


def test_launches_run_on_the_tensors_device(monkeypatch):
    """The guard switches to the tensor's device. A stand-in checks it, because there is only one
    GPU."""
    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        __enter__ = __exit__ = lambda *args: None

    class OnSecondGpu:
        is_cuda, device = True, torch.device("cuda", 1)

        def get_device(self):
            return self.device.index

    monkeypatch.setattr(torch.cuda, "device", Device)
    for current, expected in ((1, []), (0, [torch.device("cuda", 1)])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert raw_ops.on_device_of(OnSecondGpu(), lambda: list(entered)) == expected


@pytest.mark.parametrize("op", OPS)
def test_autograd_is_left_out_where_nothing_needs_a_gradient(op, accelerated, monkeypatch):
    call, inputs = every_op()[op]
    applied, apply = [], torch.autograd.Function.apply.__func__
    spy = classmethod(lambda cls, *args: (applied.append(cls), apply(cls, *args))[1])
    monkeypatch.setattr(torch.autograd.Function, "apply", spy)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with kernels.use(accelerated):
        plain = call(*inputs)
        with torch.no_grad():
            again = call(*leaves)
        assert not applied
        call(*leaves)
        for i in range(len(inputs)):  # one input that requires a gradient is enough
            call(*(x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)))
    assert len(applied) == 1 + len(inputs)
    assert bits_equal(as_tensor(plain), as_tensor(again))


def test_tensors_on_different_devices_are_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weight must be on cpu, got meta"):
        kernels.layer_norm(x, torch.ones(3, device="meta"), torch.ones(3))
