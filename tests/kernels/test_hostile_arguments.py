"""Operators called with arguments that do not fit together must raise, and never access other
memory.

One or two arguments of a valid call are replaced by tensors of wrong shapes, dtypes, devices,
strides and sizes, and by absurd numbers. Each call must return or raise; `make sanitize` runs the
same calls with an AddressSanitizer build of the library.
"""

import random
import warnings

import numpy as np
import pytest
import torch
from util import DEVICE

from gpt2 import kernels
from gpt2.kernels.native import cpu

B, T, H, D, V, N = 2, 5, 2, 8, 11, 6
C = H * D
# Errors that a caller may see; the last is for an operator without a kernel for a device or a
# layout.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)
NUMBERS = {
    int: [0, 1, -1, 3, 7, 2**31, 2**62, -(2**63), 2**63 - 1, 2**64, 1.5, None, "2"],
    float: [0.0, -1.0, 2.0, 1e300, float("inf"), float("nan"), None, "2"],
    str: ["", "mean", "reference", None],
    bool: [True, False, None],
    type(None): [0, 1.5, torch.zeros(1), torch.zeros(1, dtype=torch.int64)],
}
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int8, torch.bool, torch.complex64,
)  # fmt: skip


def f(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def ids(*shape, most=V):
    return torch.randint(most, shape)


def decode_layers_parts(dtype=torch.float32, layers=2):
    """x, kv, lengths, the last norm, and for each layer six pairs of weight and bias."""
    shapes = [[(C,)] * 2, [(3 * C, C), (3 * C,)], [(C, C), (C,)], [(C,)] * 2,
              [(4 * C, C), (4 * C,)], [(C, 4 * C), (C,)]]  # fmt: skip
    params = [f(*shape, dtype=dtype) for _ in range(layers) for pair in shapes for shape in pair]
    kv = f(layers, B, T, 2, H, D, dtype=dtype)
    return [f(B, C, dtype=dtype), kv, ids(B, most=T), f(C), f(C)], params


def raw_calls():
    """At least one valid call of every raw operator of the library."""
    q, k, v, do, o = (f(B, n, H, D) for n in (T, T + 2, T + 2, T, T))
    qkv, lse, seed = f(B, T, 3 * C), f(B, H, T), torch.tensor([7])
    for options in ((0.3, 0.0, None), (0.3, 0.5, seed)):
        yield "attention_fwd", (q, k, v, *options)
        yield "attention_bwd", (do, q, k, v, o, lse, *options)
        yield "attention_qkv_fwd", (qkv, H, *options)
        yield "attention_qkv_bwd", (do.flatten(2), qkv, o.flatten(2), lse, H, *options)
    yield "decode_attention", (f(B, 1, H, D), k, v, ids(B, most=T), 0.3)
    for half in (torch.float32, torch.bfloat16):
        x, row, stats = f(B, T, C, dtype=half), f(C), f(2, B * T)
        yield "layer_norm_fwd", (x, row, row, 1e-5)
        yield "add_layer_norm_fwd", (x, f(B, T, C), row, row, 1e-5)
        yield "layer_norm_bwd", (x, x, x, row, stats)
        yield "bias_gelu_fwd", (x, row)
        yield "bias_gelu_bwd", (x, x, row)
    yield "layer_norm_bwd", (x, None, x, row, stats)
    yield "mixed_layer_norm_bwd", (x, f(B, T, C), f(B, T, C), row, stats)
    yield "gelu_fwd", (x,)
    yield "gelu_bwd", (x, x)
    logits, targets, stats = f(N, V), ids(N), f(2, N)
    for options in ((-100, 0.0), (-100, 0.1)):
        yield "cross_entropy_fwd", (logits, targets, *options)
        yield "cross_entropy_bwd", (f(N), logits, targets, stats, *options)
        yield "cross_entropy_bwd_", (f(N), logits, targets, stats, *options)
        yield "cross_entropy_fwd_bwd_", (logits, targets, *options, V - 2)


def cpu_calls():
    """Calls of the operators that only the CPU library has."""
    x, packed, scale = f(3, C), *kernels.quantize_int8(f(V, C))
    yield "linear", (x, f(V, C), f(V), None)
    yield "linear", (x, packed, None, scale)
    (x, kv, lengths, *norm), params = decode_layers_parts()
    # Lists of tensors are flattened here; raw_decode_layers restores them.
    yield "decode_layers", (x, kv, lengths, *norm, H, 1e-5, *params)


def public_calls():
    q, k, v = f(B, T, H, D), f(B, T, H, D), f(B, T, H, D)
    x, row, targets = f(B, T, C), f(C), ids(B, T)
    yield kernels.causal_attention, (q, k, v)
    yield kernels.causal_attention_qkv, (f(B, T, 3 * C), H)
    yield kernels.decode_attention, (f(B, 1, H, D), k, v, ids(B, most=T))
    yield kernels.layer_norm, (x, row, row, 1e-5)
    yield kernels.add_layer_norm, (x, f(B, T, C), row, row, 1e-5)
    yield kernels.add_layer_norm, (x.bfloat16(), f(B, T, C), row, row, 1e-5)
    yield kernels.gelu, (x,)
    yield kernels.bias_gelu, (x, row)
    yield kernels.cross_entropy, (f(B, T, V), targets, -100)
    yield kernels.linear_cross_entropy, (x, f(V, C), targets, -100)


def public_cpu_calls():
    x = f(3, C)
    yield kernels.linear, (x, f(V, C), f(V))
    yield kernels.linear_int8, (x, *kernels.quantize_int8(f(V, C)), f(V))
    yield kernels.quantize_int8, (f(V, C),)
    (x, kv, lengths, *norm), params = decode_layers_parts(layers=1)
    yield decode, (x, kv, lengths, *norm, H, 1e-5, *params)


def decode(x, kv, lengths, norm, norm_bias, n_head, eps, *params):
    """DecodeLayers of layers with the parameters params, twelve each."""
    from gpt2.generate.decode_layers import DecodeLayers, Layer, Linear, Norm

    layers = []
    for at in range(0, len(params), 12):
        pairs = [params[i : i + 2] for i in range(at, at + 12, 2)]
        kinds = (Norm, Linear, Linear, Norm, Linear, Linear)
        layers.append(Layer(*(kind(*pair) for kind, pair in zip(kinds, pairs, strict=True))))
    return DecodeLayers(layers, Norm(norm, norm_bias), n_head=n_head, eps=eps)(x, kv, lengths)


def raw_decode_layers(x, kv, lengths, norm, norm_bias, n_head, eps, *params):
    # If a list holds anything but tensors, PyTorch's error prints the list, and printing a tensor
    # with freed storage ends the process.
    if not all(isinstance(p, torch.Tensor) for p in params):
        raise TypeError("params must hold only tensors")
    return torch.ops.gpt2_kernels_cpu.decode_layers(
        x, list(params), [], norm, norm_bias, kv, lengths, n_head, eps
    )


def hostile(value, rng, more=()):
    """A hostile value in place of one argument. more: additional kinds, which crash PyTorch's own
    operators."""
    if not isinstance(value, torch.Tensor):
        return rng.choice(NUMBERS[type(value)])
    x = value.clone()
    axis = rng.randrange(x.dim()) if x.dim() else 0
    kinds = ("dtype", "size", "size", "rank", "strides", "strides", "other", "ids", *more)
    kind = rng.choice(kinds)
    if kind == "storage":
        x.untyped_storage().resize_(rng.choice((0, x.untyped_storage().nbytes() // 2)))
        return x
    if kind == "dtype":
        return x.to(rng.choice(DTYPES))
    if kind == "size" and x.dim():
        size = rng.choice((0, 1, x.shape[axis] - 1, x.shape[axis] + 1, 2 * x.shape[axis], 1000))
        return x.new_zeros(*x.shape[:axis], size, *x.shape[axis + 1 :])
    if kind == "rank":
        return rng.choice((x.flatten(), x[None], x[..., None], x.new_zeros(()), x.new_zeros(0)))
    if kind == "strides" and x.dim():
        wider = torch.cat([x, x], axis)
        every_second = wider[(slice(None),) * axis + (slice(None, None, 2),)]
        first = x.narrow(axis, 0, min(1, x.shape[axis]))
        return rng.choice(
            (every_second, first.expand(x.shape) if x.numel() else x, x.t() if x.dim() == 2 else
             x.transpose(0, -1), x.transpose(0, -1).contiguous().transpose(0, -1))
        )  # fmt: skip
    if kind == "ids" and not x.is_floating_point():
        return x.fill_(rng.choice((-1, 10**9, 2**31) if x.dtype == torch.int64 else (-1, 127)))
    return rng.choice(
        (x.to("meta"), None, [1.0], x.flatten(),
         x.cpu().numpy() if x.dtype != torch.bfloat16 else 3,
         x[..., None].expand(*x.shape, 3)[..., 0], x.requires_grad_(x.is_floating_point()),
         x.double().to_sparse() if x.numel() else None)
    )  # fmt: skip


def attack(function, args, rng, count, more=()):
    """Tries count hostile variants of a call; returns how many were refused."""
    refused = 0
    for _ in range(count):
        changed = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        for at in rng.sample(range(len(args)), min(len(args), rng.choice((1, 1, 2)))):
            changed[at] = hostile(changed[at], rng, more)
        try:
            function(*changed)
        except REFUSALS as error:
            assert not went_astray(error), error
            refused += 1
    return refused


def went_astray(error):
    """Whether an emulated or interpreted kernel was stopped at an address outside its memory."""
    return "Findings" in str(error) or "Fault" in type(error).__name__


def count_of(request, many, few):
    return many if request.config.getoption("--full") else few


def test_raw_operators(cpu_backend, request):
    """The library's own checks: anyone may call a raw operator. There were none, and too small
    tensors were read and written out of bounds."""
    rng = random.Random(request.node.name)
    library = torch.ops.gpt2_kernels_cpu
    for name, args in [*raw_calls(), *cpu_calls()]:
        function = raw_decode_layers if name == "decode_layers" else getattr(library, name)
        function(*(x.clone() if isinstance(x, torch.Tensor) else x for x in args))
        assert attack(function, args, rng, count_of(request, 300, 30), ("storage",)) > 0, name


@pytest.mark.cuda_kernels
def test_raw_operators_of_cuda(request, monkeypatch):
    from backends import serving

    rng = random.Random(request.node.name)
    with serving("cuda", monkeypatch):
        library = torch.ops.gpt2_kernels_cuda
        for name, args in raw_calls():
            on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]
            attack(getattr(library, name), on_device, rng, count_of(request, 20, 3))


def test_public_functions(accelerated, request):
    rng = random.Random(request.node.name)
    few = 40 if accelerated == "cpu" else 4
    with kernels.use(accelerated):
        for function, args in public_calls():
            attack(function, args, rng, count_of(request, 5 * few, few))


def test_public_functions_of_the_cpu(cpu_backend, request):
    rng = random.Random(request.node.name)
    for function, args in public_cpu_calls():
        function(*args)
        attack(function, args, rng, count_of(request, 500, 50))


def read_only(path, *shape):
    """Zeros in a file that is mapped read-only."""
    np.zeros(shape, np.float32).tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that such tensors must not be written
        return torch.from_numpy(np.memmap(path, np.float32, "r", shape=shape))


@pytest.mark.cpu_kernels
def test_a_gradient_in_place_of_memory_that_is_mapped_read_only(tmp_path):
    """The backward died with a segmentation fault. Reading such memory works."""
    mapped = read_only(tmp_path / "logits", N, V)
    refused = pytest.raises(RuntimeError, match="logits must be writable, got memory that is")
    with kernels.use("cpu"):
        for logits in (mapped.clone().requires_grad_(), f(N, V).requires_grad_()):
            loss = kernels.cross_entropy(logits, ids(N), inplace_backward=True)
            logits.data = mapped
            with refused:
                loss.backward()
        logits = mapped.clone().requires_grad_()
        kernels.cross_entropy(logits, ids(N)).backward()
        assert logits.grad.isfinite().all()


@pytest.mark.cpu_kernels
def test_a_cache_that_is_mapped_read_only(tmp_path):
    (x, kv, *rest), params = decode_layers_parts(layers=1)
    kv = read_only(tmp_path / "kv", *kv.shape)
    with pytest.raises(RuntimeError, match="kv must be writable"):
        decode(x, kv, *rest, H, 1e-5, *params)


@pytest.mark.parametrize("Tk", [0, 3])
def test_a_trillion_sequences_of_no_queries_take_no_time(Tk, cpu_backend):
    q, k = torch.empty(2**40 if Tk == 0 else 2, 0, 2, 8), torch.randn(2, Tk, 2, 8)
    k = q if Tk == 0 else k.requires_grad_()
    with kernels.use("cpu"):
        o = kernels.causal_attention(q, k, k)
    assert o.shape == q.shape
    if Tk:
        o.sum().backward()
        assert not k.grad.any()


def test_numbers_that_no_float_holds():
    q = f(1, 1, 1, 8)
    with pytest.raises(ValueError, match="softmax_scale must be a number that a float holds"):
        kernels.causal_attention(q, q, q, softmax_scale=10**400)
    with pytest.raises(ValueError, match="eps must be a number that a float holds"):
        kernels.layer_norm(q, eps=10**400)


@pytest.mark.cpu_kernels
def test_lengths_that_lie_in_the_cache():
    """The first layer's keys overwrote the lengths, and the second wrote to wherever they then
    pointed."""
    (x, _, _, *norm), params = decode_layers_parts()
    kv = torch.zeros(2, 1, T, 2, H, D)
    lengths = kv.view(-1).view(torch.int64)[:1]
    x = x[:1]
    want = decode(x, kv.clone(), torch.tensor([0]), *norm, H, 1e-5, *params)
    assert torch.equal(decode(x, kv, lengths, *norm, H, 1e-5, *params), want)


def test_every_raw_operator_is_called():
    if cpu._library_reason() is not None:
        pytest.skip(cpu._library_reason())
    tried = {name for name, _ in [*raw_calls(), *cpu_calls()]}
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("gpt2_kernels_cpu::") for s in schemas
             if s.name.startswith("gpt2_kernels_cpu::")}  # fmt: skip
    assert names - {"isa", "isas", "use_isa"} == tried
