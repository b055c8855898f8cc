"""Which backend serves a call, and what PyTorch's machinery makes of it."""

import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from util import DEVICE, as_tuple, bits_equal, launches

from gpt2 import kernels
from gpt2.kernels import dispatch, raw_ops, reference

ROOT = Path(__file__).resolve().parents[1]


def tensor(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def every_op():
    """One call of each public op: (name, function, differentiable inputs)."""
    targets = torch.tensor([1, -100, 3], device=DEVICE)
    row = tensor(16)
    return {
        "causal_attention": (kernels.causal_attention, [tensor(1, 5, 2, 16) for _ in range(3)]),
        "causal_attention_qkv": (
            lambda x: kernels.causal_attention_qkv(x, 2),
            [tensor(1, 5, 96)],
        ),
        "layer_norm": (kernels.layer_norm, [tensor(3, 16), row, row]),
        "add_layer_norm": (kernels.add_layer_norm, [tensor(3, 16), tensor(3, 16), row, row]),
        "gelu": (kernels.gelu, [tensor(3, 16)]),
        "bias_gelu": (kernels.bias_gelu, [tensor(3, 16), row]),
        "cross_entropy": (lambda x: kernels.cross_entropy(x, targets), [tensor(3, 7)]),
        "linear_cross_entropy": (
            lambda x, w: kernels.linear_cross_entropy(x, w, targets),
            [tensor(3, 16), tensor(7, 16)],
        ),
    }


OPS = list(every_op())


def as_tensor(result):
    return torch.cat([y.flatten().float() for y in result]) if type(result) is tuple else result


# ---- the choice


def test_every_public_op_is_tested_here():
    public = {name for name in kernels.__all__ if name.islower()} - {"report", "use", "why_not"}
    assert public - {"decode_attention", "linear", "linear_int8", "quantize_int8"} == set(OPS), (
        "they have test files of their own"
    )


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_serves_or_raises(op, accelerated, monkeypatch):
    call, inputs = every_op()[op]
    with kernels.use(accelerated), launches() as launched:
        call(*inputs)
    assert set(launched) == {accelerated}
    with kernels.use("reference"), launches() as launched:
        call(*inputs)
    assert not launched
    monkeypatch.setattr(getattr(kernels, accelerated), "why_not", lambda *args: "not today")
    reason = rf"{accelerated} cannot serve \w+: not today"
    with kernels.use(accelerated), pytest.raises(kernels.BackendUnavailable, match=reason):
        call(*inputs)


def test_without_a_library_one_line_speaks_for_every_op(monkeypatch):
    """Without a compiler each op said so for itself, in two long lines."""
    reason = "no C++ compiler: none of c++, g++, clang++ is on PATH; set CXX"
    monkeypatch.setattr(kernels.cpu, "_library_reason", lambda: reason)
    for backend in (kernels.triton, kernels.cuda):
        monkeypatch.setattr(backend, "why_not", lambda *args: "not for this device")
    dispatch._said.clear()
    x = torch.randn(2, 3, 4)
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            kernels.gelu(x)
            kernels.layer_norm(x, torch.ones(4), torch.ones(4))
            kernels.cross_entropy(x, torch.zeros(2, 3).long())
    (warning,) = said
    line = warnings.formatwarning(
        warning.message, warning.category, warning.filename, warning.lineno
    )
    assert line == (
        f"gpt2.kernels:0: UserWarning: plain PyTorch computes in place of every kernel: {reason}\n"
    )


def test_fallback_says_so_once(monkeypatch):
    monkeypatch.setitem(dispatch.PRIORITY, "gelu", ("triton", "cuda", "cpu"))
    monkeypatch.setattr(kernels.triton, "why_not", lambda *args: "not today")
    monkeypatch.setattr(kernels.cuda, "why_not", lambda *args: "nor tomorrow")
    monkeypatch.setattr(kernels.cpu, "why_not", lambda *args: "nor today")
    dispatch._said.clear()
    with pytest.warns(UserWarning) as said:
        for _ in range(3):
            kernels.gelu(tensor(3))
    assert len(said) == 1
    message = (
        "gelu falls back to plain PyTorch (triton: not today; cuda: nor tomorrow; cpu: nor today)"
    )
    assert message in str(said[0].message)
    assert said[0].filename == __file__, "the warning points at the caller"


def test_use_nests_and_ends_with_its_block():
    with kernels.use("reference"):
        with pytest.raises(RuntimeError, match="inside"), kernels.use("triton"):
            assert dispatch.forced() == "triton"
            raise RuntimeError("inside")
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None


def test_unknown_backends_are_named():
    with (
        pytest.raises(
            ValueError, match="backend must be one of triton, cuda, cpu, reference, got 'tritn'"
        ),
        kernels.use("tritn"),
    ):
        pass


def test_backward_runs_where_the_forward_did(accelerated):
    """Outside of the use() block too, and on autograd's own thread."""
    x = tensor(5).requires_grad_()
    with kernels.use(accelerated):
        y = kernels.gelu(x)
    with kernels.use("reference"), launches() as launched:
        y.sum().backward()
    assert launched == [accelerated]


def test_reasons_without_a_gpu():
    why = kernels.triton._cached_device_reason.__wrapped__
    assert "needs a CUDA tensor, this one is on mps" in why("mps", None)


@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((7, 5), None, "needs compute capability 8.0 or newer, this GPU has 7.5"),
        ((9, 0), "6.0", "needs an NVIDIA GPU, this build of PyTorch is for ROCm"),
        ((8, 0), None, None),
    ],
)
def test_reasons_with_a_gpu(capability, hip, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kernels.triton._cached_device_reason.__wrapped__("cuda", 0) == reason


def test_reason_for_a_dtype():
    reason = kernels.why_not("triton", "gelu", torch.device(DEVICE), torch.float64)
    assert "float64" in reason or "triton cannot be imported" in reason


def run_python(code, *flags, cwd=ROOT, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, env=env
    )


def test_report_is_a_table():
    done = subprocess.run(
        [sys.executable, "-m", "gpt2.kernels"], capture_output=True, text=True, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("\n\ncuda would be faster")[0].splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}")
    assert lines[2].split() == ["op", "served", "by", "triton", "cuda", "cpu", "reference"]
    assert [line.split()[0] for line in lines[3:]] == list(dispatch.OPS)
    rows = [re.split(r"\s{2,}", line) for line in lines[3:]]
    reasons = {row[0]: dict(zip(kernels.BACKENDS, row[2:], strict=True)) for row in rows}
    for op, served_by, *_ in rows:
        asked = (*dispatch._candidates(op, torch.device(DEVICE)), "reference")
        able = [b for b in asked if reasons[op][b] == "yes"]
        assert served_by.partition(", backward")[0] == able[0], op
    if DEVICE == "cuda":
        assert all(reasons[op]["cpu"] != "yes" for op in dispatch.OPS)
    else:
        native = kernels.why_not("cpu", "gelu", torch.device("cpu"), torch.float32) is None
        assert {served_by for _, served_by, *_ in rows} == {"cpu" if native else "reference"}
        assert all("needs a CUDA tensor, this one is on cpu" in line for line in lines[3:])


def test_a_machine_without_triton():
    """Import works, the reason is told, and the ops run as plain PyTorch."""
    done = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, warnings; from gpt2 import kernels\n"
        "kernels.cpu.why_not = lambda *args: 'not today'\n"
        "reason = kernels.triton._cached_device_reason('cpu', None)\n"
        "assert 'triton cannot be imported' in reason, reason\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    kernels.gelu(torch.ones(3))\n"
        "assert 'triton cannot be imported' in str(said[0].message)\n"
        "print(kernels.report())",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    assert "triton cannot be imported" in done.stdout


# ---- PyTorch's machinery


@pytest.mark.parametrize("op", OPS)
@pytest.mark.no_poison
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
    # in test_decode_attention.py, test_few_rows.py and test_generation.py
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
    """Products take the autocast dtype, attention's among them; other ops keep that of their
    inputs, as in PyTorch. Gradients have that of their inputs."""
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
    """bf16 activations with fp32 weights are served; activations of two dtypes are not, but for a
    float32 stream beside a branch of 16 bits."""
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
    """The guard switches to the tensor's device: seen by a stand-in, as one GPU is all there is."""
    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        __enter__ = __exit__ = lambda *args: None

    class OnSecondGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Device)
    launched = raw_ops._on_device_of(OnSecondGpu(), lambda: list(entered))
    assert launched == [torch.device("cuda", 1)]


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
        for i in range(len(inputs)):  # one that needs a gradient is enough
            call(*(x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)))
    assert len(applied) == 1 + len(inputs)
    assert bits_equal(as_tensor(plain), as_tensor(again))


def test_tensors_on_different_devices_are_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weight must be on cpu, got meta"):
        kernels.layer_norm(x, torch.ones(3, device="meta"), torch.ones(3))


def test_no_flush_to_zero_leaks_out(accelerated):
    assert float.fromhex("0x0.0000000000001p-1022") != 0
    with kernels.use(accelerated):
        for call, inputs in every_op().values():
            call(*inputs)
            assert torch.tensor(5e-324, dtype=torch.float64).item() != 0
            assert (torch.tensor(1e-45) * 1).item() != 0
