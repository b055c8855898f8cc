"""All of a GPT-2's blocks for one new token of a few sequences, as one call.

A step of decoding is some eighty small kernels; called one by one from Python on a CPU they take
half as long again as reading the weights does. csrc/ops/decode_layers.cpp calls the same kernels in
the same order: the bits are those of the blocks themselves, run on the cpu backend.

    B sequences   L layers   T positions of the cache   C = H * D features
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .checks import check_ids, check_tensor
from .linear import BLOCK, FEW
from .raw_ops import raw


class Linear(NamedTuple):
    """weight (N, K), or with a scale (N,) the packed int8 of quantize_int8; bias (N,)."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None


class Norm(NamedTuple):
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)


class Layer(NamedTuple):
    """A block: s += proj(attention(qkv(norm_1(s)))), then s += mlp_proj(gelu(fc(norm_2(s))))."""

    norm_1: Norm
    qkv: Linear  # (3C, C)
    proj: Linear  # (C, C)
    norm_2: Norm
    fc: Linear  # (4C, C)
    mlp_proj: Linear  # (C, 4C)


class DecodeLayers:
    """h = layers(x, kv, lengths): x (B, C), the embedded tokens, through every block and the last
    norm: (B, C). kv (L, B, T, 2, H, D) is a cache of which lengths[b] positions are filled; the
    tokens' keys and values are written to the next. Inference only.

    Raises TypeError or ValueError, naming the argument, where a tensor's shape, dtype or device is
    not that of a GPT-2 whose dtype and device are those of layers[0].qkv.bias; BackendUnavailable
    where the CPU has no kernels.
    """

    Linear, Norm, Layer = Linear, Norm, Layer

    def __init__(self, layers: Sequence[Layer], norm: Norm, *, n_head: int, eps: float = 1e-5):
        if not layers:
            raise ValueError("layers must not be empty")
        first = layers[0].qkv.bias
        check_tensor("layers[0].qkv.bias", first, like=first)
        self.C = first.numel() // 3
        self.dtype, self.device = first.dtype, first.device
        if type(n_head) is not int or n_head < 1 or self.C % n_head:
            raise ValueError(f"n_head must be an int that divides C = {self.C}, got {n_head!r}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        reason = dispatch.why_not("cpu", "linear", self.device, self.dtype)
        if reason is not None:
            raise dispatch.BackendUnavailable(f"cpu cannot serve DecodeLayers: {reason}")
        self.n_head, self.eps = n_head, eps
        sums = torch.promote_types(self.dtype, torch.float32)
        self._check_norm("norm", norm)
        self.norm = [t.detach().to(sums).contiguous() for t in norm]
        self.params, self.scales = [], []
        for i, layer in enumerate(layers):
            self._check(f"layers[{i}]", layer)
            for part in layer:
                weight, bias = part.weight.detach(), part.bias.detach()
                if isinstance(part, Norm):
                    weight = weight.to(sums)
                elif part.scale is not None:
                    self.scales.append(part.scale.contiguous())
                if isinstance(part, Norm) or part is layer.fc:  # the GELU's bias
                    bias = bias.to(sums)
                self.params += [weight.contiguous(), bias.contiguous()]
        if len(self.scales) not in (0, 4 * len(layers)):
            raise ValueError("layers must be int8 as a whole or not at all")

    def _check(self, name: str, layer: Layer) -> None:
        C = self.C
        for field in ("norm_1", "norm_2"):
            self._check_norm(f"{name}.{field}", getattr(layer, field))
        for field, N, K in (("qkv", 3 * C, C), ("proj", C, C), ("fc", 4 * C, C),
                            ("mlp_proj", C, 4 * C)):  # fmt: skip
            weight, bias, scale = getattr(layer, field)
            width, dtype = K, self.dtype
            if scale is not None:
                width, dtype = -(-K // BLOCK) * BLOCK, torch.int8
            self._check_tensor(f"{name}.{field}.weight", weight, (N, width), dtype)
            self._check_tensor(f"{name}.{field}.bias", bias, (N,), self.dtype)
            if scale is not None:
                self._check_tensor(f"{name}.{field}.scale", scale, (N,), torch.float32)

    def _check_norm(self, name: str, norm: Norm) -> None:
        for field, row in norm._asdict().items():
            check_tensor(f"{name}.{field}", row, like=row)
            self._check_tensor(f"{name}.{field}", row, (self.C,), row.dtype)

    def _check_tensor(self, name: str, x, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.shape != shape or x.dtype != dtype or x.device != self.device:
            raise ValueError(
                f"{name} must have shape {shape} and be {dtype} on {self.device}, "
                f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )

    @staticmethod
    def serve(x: Tensor, B: int) -> bool:
        """Whether the kernels can serve B sequences of x's device and dtype here, now."""
        if B > FEW or torch.is_autocast_enabled(x.device.type):
            return False
        needed = ("linear", "attention", "layer_norm", "gelu")
        return all(dispatch.kernel_for(op, x.device, x.dtype) == "cpu" for op in needed)

    def __call__(self, x: Tensor, kv: Tensor, lengths: Tensor) -> Tensor:
        for name, tensor, dim in (("x", x, 2), ("kv", kv, 6), ("lengths", lengths, 1)):
            if not isinstance(tensor, Tensor) or tensor.dim() != dim:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be a tensor of {dim} dimensions, got {got}")
        B, T = len(x), kv.shape[2]
        layers, D = len(self.params) // 12, self.C // self.n_head
        self._check_tensor("x", x, (B, self.C), self.dtype)
        self._check_tensor("kv", kv, (layers, B, T, 2, self.n_head, D), self.dtype)
        self._check_tensor("lengths", lengths, (B,), torch.int64)
        if not kv.is_contiguous():
            raise ValueError(f"kv must be contiguous, got strides {kv.stride()}")
        check_ids("lengths", lengths, T)
        return raw.decode_layers(
            x.contiguous(), self.params, self.scales, *self.norm, kv, lengths.contiguous(),
            self.n_head, self.eps, "cpu",
        )  # fmt: skip
