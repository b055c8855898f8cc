"""Runs all blocks of a GPT-2 for one new token of a few sequences in a single call.

A step of decoding runs some eighty small kernels. Calling them one by one from Python on a CPU
adds half of the time that reading the weights takes. csrc/ops/decode_layers.cpp calls the same
kernels in the same order, so the result has the same bits as the blocks on the cpu backend.

    B sequences   L layers   T positions of the cache   C = H * D features
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.checks import check_ids, check_tensor
from ..kernels.linear import BLOCK, FEW
from ..kernels.raw_ops import raw


class Linear(NamedTuple):
    """weight (N, K), bias (N,). With a scale (N,), weight is the packed int8 of quantize_int8."""

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
    """h = layers(x, kv, lengths) runs x through every block and the last norm.

    x (B, C) holds the embedded tokens; h is (B, C). kv (L, B, T, 2, H, D) is the cache: sequence b
    has lengths[b] filled positions, and its new key and value are written to the next one.
    Inference only.

    The dtype and device are those of layers[0].qkv.bias. Raises TypeError or ValueError, naming
    the argument, if a tensor's shape, dtype or device does not fit a GPT-2 of these. Raises
    BackendUnavailable if there are no kernels for this CPU.
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
        """Whether the cpu backend is chosen for B sequences of x's device and dtype."""
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


def decode_layers(model, weight: Tensor, B: int) -> DecodeLayers | None:
    """The model's blocks as a DecodeLayers. None unless the model is unmodified, B is small, and
    the cpu backend runs its kernels."""
    if not DecodeLayers.serve(weight, B) or not model.is_stock():
        return None

    def linear(layer):
        return Linear(layer.weight, layer.bias, getattr(layer, "scale", None))

    def norm(layer):
        return Norm(layer.weight, layer.bias)

    layers = [
        Layer(
            norm(block.ln_1), linear(block.attn.c_attn), linear(block.attn.c_proj),
            norm(block.ln_2), linear(block.mlp.c_fc), linear(block.mlp.c_proj),
        )
        for block in model.transformer["h"]
    ]  # fmt: skip
    ln_f = model.transformer["ln_f"]
    return DecodeLayers(layers, norm(ln_f), n_head=model.config.n_head, eps=ln_f.eps)
