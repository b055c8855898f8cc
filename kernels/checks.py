"""Checks of the public functions' arguments. An error names the argument, what was expected and
what was given.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size   C features   V vocabulary
"""

import math
import operator
from numbers import Integral, Real

import torch
from torch import Tensor

from .ids import validate
from .matmul import is_autocasting
from .raw_ops import raw

HALVES = (torch.bfloat16, torch.float16)


def autocasting(x: Tensor) -> bool:
    return is_autocasting(x.device.type) and x.dtype != torch.float64


def check_ids(name: str, ids: Tensor, size: int, ignore_index: int | None = None) -> Tensor:
    """Returns ids after checking that each lies in [0, size) or equals ignore_index.

    Raises ValueError with an id that does not, because an assertion on the device would not name
    it. On a GPU a later call raises it, because nothing waits for the device: see ids.py.
    """
    if torch.compiler.is_compiling():
        return raw.check_ids(ids, name, size, ignore_index)
    validate(ids, name, size, ignore_index)
    return ids


def check_tensor(name: str, x, *, like: Tensor, dtype: bool = True) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    if dtype and x.dtype != like.dtype and not autocasting(like):
        raise TypeError(f"{name} must have dtype {like.dtype}, got {x.dtype}")


def check_row(name: str, row, x: Tensor) -> None:
    check_tensor(name, row, like=x, dtype=False)
    if not x.dim() or row.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have the shape of x's last dimension, "
            f"got {tuple(row.shape)} for x {tuple(x.shape)}"
        )


def check_norm(x, weight, bias, eps) -> None:
    check_tensor("x", x, like=x)
    if x.dim() == 0:
        raise ValueError("x must have a last dimension to normalize, got a 0-d tensor")
    for name, row in (("weight", weight), ("bias", bias)):
        if row is not None:
            check_row(name, row, x)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def check_residual(residual, x: Tensor) -> None:
    check_tensor("residual", residual, like=x, dtype=False)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    allowed = (x.dtype, torch.float32) if x.dtype in HALVES else (x.dtype,)
    if residual.dtype not in allowed and not autocasting(x):
        expected = " or ".join(map(str, allowed))
        raise TypeError(f"residual must have dtype {expected}, got {residual.dtype}")


def check_loss(reduction, label_smoothing) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")


def check_targets(targets, x: Tensor, V: int, ignore_index: int) -> Tensor:
    """Returns targets; the caller must use the result, or torch.compile drops the check."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be an int64 tensor, got {got}")
    check_integer("ignore_index", ignore_index)
    if x.dim() < 2 or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets must have the leading shape of the logits, "
            f"got {tuple(targets.shape)} for {tuple(x.shape)}"
        )
    if targets.device != x.device:
        raise ValueError(f"targets must be on {x.device}, got {targets.device}")
    if V == 0:
        raise ValueError(f"the vocabulary must not be empty, got {tuple(x.shape)}")
    return check_ids("targets", targets, V, ignore_index)


def check_number(name: str, value) -> None:
    if type(value) is not float and not isinstance(value, Real):  # isinstance takes 0.3 µs
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float holds, got a larger one") from None


def check_integer(name: str, value) -> None:
    if type(value) is not int and not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")


def attention_scalars(x, D, softmax_scale, dropout_p, seed):
    """softmax_scale as a float, and seed as a (1,) int64 tensor, or None without dropout."""
    if D == 0:
        raise ValueError("the head size must be at least 1, got 0")
    check_number("dropout_p", dropout_p)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    scale = 1.0 / math.sqrt(D) if softmax_scale is None else float(softmax_scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p}")
    if dropout_p == 0.0:
        return scale, None
    if seed is None:  # drawn on the device: a CUDA graph replays with a fresh mask
        return scale, torch.randint(2**63 - 1, (1,), device=x.device)
    if isinstance(seed, Tensor):
        if not seed.dim() and not seed.is_floating_point():
            seed = seed.to(x.device, torch.int64).view(1)
        if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device:
            raise ValueError(
                f"seed must be an int, or a (1,) int64 tensor on {x.device}, "
                f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            )
        return scale, seed
    try:
        seed = operator.index(seed)  # NumPy's integers too
    except TypeError:
        raise TypeError(
            f"seed must be an int or a (1,) int64 tensor, got {type(seed).__name__} {seed!r}"
        ) from None
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return scale, torch.full((1,), seed, dtype=torch.int64, device=x.device)
