"""All of a GPT-2's blocks for one new token of a few sequences, as one call.

A step of decoding is some eighty small kernels; called one by one from Python on a CPU they take
half as long again as reading the weights does. csrc/cpu/ops_decode.cpp calls the same kernels in
the same order: the bits are those of the blocks themselves, run on the cpu backend.

    B sequences   L layers   T positions of the cache   C = H * D features
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .checks import check_ids
from .linear import FEW
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

    Raises ValueError where a layer's shapes, or their dtypes, are not a GPT-2's.
    """

    Linear, Norm, Layer = Linear, Norm, Layer

    def __init__(self, layers: Sequence[Layer], norm: Norm, *, n_head: int, eps: float = 1e-5):
        self.C, self.dtype = norm.weight.shape[0], layers[0].qkv.bias.dtype
        self.n_head, self.eps = n_head, eps
        sums = torch.promote_types(self.dtype, torch.float32)
        self.norm = [t.detach().to(sums) for t in norm]
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
        for field, N, K in (("qkv", 3 * C, C), ("proj", C, C), ("fc", 4 * C, C),
                            ("mlp_proj", C, 4 * C)):  # fmt: skip
            weight, bias, scale = getattr(layer, field)
            width = K if scale is None else -(-K // 64) * 64
            dtype = self.dtype if scale is None else torch.int8
            if weight.shape != (N, width) or bias.shape != (N,) or weight.dtype != dtype:
                raise ValueError(
                    f"{name}.{field} must have a weight {(N, width)} of {dtype} and a bias {(N,)}, "
                    f"got {tuple(weight.shape)} of {weight.dtype} and {tuple(bias.shape)}"
                )
            if bias.dtype != self.dtype:
                raise ValueError(f"{name}.{field}.bias must be {self.dtype}, got {bias.dtype}")

    @staticmethod
    def serve(x: Tensor, B: int) -> bool:
        """Whether the kernels can serve B sequences of x's device and dtype here, now."""
        if B > FEW or torch.is_autocast_enabled(x.device.type):
            return False
        needed = ("gemv", "attention", "layer_norm", "gelu")
        return all(dispatch.kernel_for(op, x.device, x.dtype) == "cpu" for op in needed)

    def __call__(self, x: Tensor, kv: Tensor, lengths: Tensor) -> Tensor:
        layers, (B, C) = len(self.params) // 12, x.shape
        shape = (layers, B, kv.shape[2], 2, self.n_head, C // self.n_head)
        if kv.shape != shape or not kv.is_contiguous() or kv.dtype != x.dtype:
            raise ValueError(
                f"kv must be contiguous, {x.dtype}, of shape {shape}, "
                f"got {tuple(kv.shape)} {kv.dtype}"
            )
        if x.dtype != self.dtype or self.C != C:
            raise ValueError(
                f"x must be (B, {self.C}) {self.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        if lengths.shape != (B,) or lengths.dtype != torch.int64:
            raise ValueError(f"lengths must be ({B},) int64, got {tuple(lengths.shape)}")
        check_ids("lengths", lengths, kv.shape[2])
        return raw.decode_layers(
            x.contiguous(), self.params, self.scales, *self.norm, kv, lengths.contiguous(),
            self.n_head, self.eps, "cpu",
        )  # fmt: skip
