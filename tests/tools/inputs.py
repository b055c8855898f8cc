"""Random inputs for the tests of the ops."""

import pytest
import torch
from util import DEVICE, guarded

from gpt2 import kernels


def tensor(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def qkv_in(layout, B, Tq, Tk, H, D, dtype):
    """q, k, v with the same (B, T, H, D) values in different memory layouts."""
    if layout == "packed":  # views of one projection's output
        return tensor(B, Tk, 3, H, D, dtype=dtype)[:, Tk - Tq :].unbind(2)[0:1] + tuple(
            tensor(B, Tk, 3, H, D, dtype=dtype).unbind(2)[1:]
        )
    if layout == "heads_first":
        return tuple(tensor(B, H, T, D, dtype=dtype).transpose(1, 2) for T in (Tq, Tk, Tk))
    if layout == "sliced":  # every second row, from an offset
        return tuple(tensor(B, 2 * T + 1, H, D, dtype=dtype)[:, 1::2] for T in (Tq, Tk, Tk))
    return tuple(guarded(tensor(B, T, H, D, dtype=dtype)) for T in (Tq, Tk, Tk))


def sparse_rows(file, N, width, stride):
    """bfloat16 rows (N, width) that lie `stride` elements apart in a new, sparse file. Skips the
    test on a GPU."""
    if DEVICE == "cuda":
        pytest.skip(
            "a sparse file cannot be mapped to the GPU; its own test allocates 2^31 elements"
        )
    n = (N - 1) * stride + width
    with open(file, "wb") as f:
        f.truncate(n * 2)
    rows = torch.from_file(str(file), shared=True, size=n, dtype=torch.bfloat16)
    rows = rows.as_strided((N, width), (stride, 1))
    return rows.copy_(tensor(N, width))


def shape_id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def targets_in(N, V, ignored="some"):
    targets = torch.randint(V, (N,), device=DEVICE)
    if ignored == "some" and N > 1:
        targets[:: max(N // 3, 2)] = -100
    return targets


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


def norm_inputs(shape, dtype, weight_dtype=None, offset=0.0):
    C = shape[-1]
    return {
        "x": guarded(tensor(*shape, dtype=dtype) + offset),
        "weight": guarded(tensor(C, dtype=weight_dtype or dtype)),
        "bias": guarded(tensor(C, dtype=weight_dtype or dtype)),
    }
