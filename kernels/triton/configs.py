"""Tiles and launch shapes, with the reason for each. A table, not an autotuner: no start-up cost,
the same bits every time, and every rank of a job takes the same kernel.

None of these has been timed on hardware yet. They are the largest tiles, in the order in which they
should do best, that the compiler turns into code without spills and within 99 KiB of shared memory,
which every GPU from compute capability 8.0 on has. tests/test_compile.py holds them to that.
"""

import functools
from typing import NamedTuple

import torch
import triton


class AttentionTile(NamedTuple):
    BLOCK_M: int  # query rows
    BLOCK_N: int  # key rows
    num_warps: int
    num_stages: int


# By kernel, whether dropout is on (its random numbers take registers), and head size; 80 and 96 are
# padded to 128 lanes, and the masks that this takes cost registers too. At T = 1024, 128 x 64 tiles
# waste 11 % of their area above the diagonal, 192 x 128 waste 33 %.
_HALF = {
    ("fwd", False): {
        **dict.fromkeys((16, 32, 64), AttentionTile(128, 64, 4, 3)),
        **dict.fromkeys((80, 96), AttentionTile(64, 32, 4, 2)),
        128: AttentionTile(128, 64, 8, 2),
    },
    ("fwd", True): {
        **dict.fromkeys((16, 32), AttentionTile(128, 64, 4, 3)),
        64: AttentionTile(128, 64, 8, 3),
        **dict.fromkeys((80, 96), AttentionTile(64, 32, 4, 2)),
        128: AttentionTile(64, 64, 4, 2),
    },
    ("bwd_dq", False): {
        **dict.fromkeys((16, 32, 64), AttentionTile(128, 64, 8, 2)),
        **dict.fromkeys((80, 96, 128), AttentionTile(128, 32, 8, 2)),
    },
    ("bwd_dq", True): {
        **dict.fromkeys((16, 32, 64), AttentionTile(128, 64, 8, 2)),
        **dict.fromkeys((80, 96, 128), AttentionTile(64, 32, 4, 2)),
    },
    ("bwd_dkdv", False): {
        **dict.fromkeys((16, 32), AttentionTile(64, 128, 8, 2)),
        64: AttentionTile(32, 128, 8, 2),
        **dict.fromkeys((80, 96), AttentionTile(32, 64, 8, 2)),
        128: AttentionTile(32, 64, 4, 2),
    },
    ("bwd_dkdv", True): {
        **dict.fromkeys((16, 32), AttentionTile(64, 128, 8, 2)),
        64: AttentionTile(32, 32, 4, 1),
        **dict.fromkeys((80, 96, 128), AttentionTile(32, 64, 8, 2)),
    },
}

# Hopper's matrix instructions read their operands from shared memory: a quarter fewer registers,
# enough for GPT-2's head size to keep 64 query rows a step.
_HALF_HOPPER = {("bwd_dkdv", p): {64: AttentionTile(64, 128, 8, 2)} for p in (False, True)}

# True float32 runs on the FMA units, operands in registers whole: small tiles, many warps.
_FLOAT = {
    ("fwd", False): {
        **dict.fromkeys((16, 64), AttentionTile(64, 32, 8, 2)),
        32: AttentionTile(32, 32, 4, 2),
        **dict.fromkeys((80, 96, 128), AttentionTile(16, 32, 4, 1)),
    },
    ("fwd", True): {
        **dict.fromkeys((16, 32, 64, 128), AttentionTile(64, 32, 8, 2)),
        **dict.fromkeys((80, 96), AttentionTile(32, 32, 4, 2)),
    },
    ("bwd_dq", False): {
        **dict.fromkeys((16, 32, 64), AttentionTile(64, 32, 8, 2)),
        **dict.fromkeys((80, 96), AttentionTile(32, 32, 8, 2)),
        128: AttentionTile(32, 32, 4, 2),
    },
    ("bwd_dq", True): {
        **dict.fromkeys((16, 32, 64), AttentionTile(64, 32, 8, 2)),
        **dict.fromkeys((80, 96, 128), AttentionTile(32, 32, 8, 2)),
    },
    ("bwd_dkdv", False): {
        **dict.fromkeys((16, 32, 64), AttentionTile(32, 32, 8, 2)),
        **dict.fromkeys((80, 96, 128), AttentionTile(32, 32, 8, 1)),
    },
}
_FLOAT["bwd_dkdv", True] = _FLOAT["bwd_dkdv", False]


def attention_config(
    kernel: str, D: int, dtype: torch.dtype, dropout: bool, device: torch.device
) -> AttentionTile:
    """The tile of "fwd", "bwd_dq" or "bwd_dkdv" for head size D."""
    if dtype == torch.float32:
        return _FLOAT[kernel, dropout][D]
    hopper = _HALF_HOPPER.get((kernel, dropout), {}) if is_hopper(device) else {}
    return hopper.get(D) or _HALF[kernel, dropout][D]


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and _properties(device.index).major == 9


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: exactly, unless PyTorch itself is allowed TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


class RowTile(NamedTuple):
    ROWS: int
    num_warps: int


def layer_norm_config(kernel: str, C: int) -> RowTile:
    """ "fwd" or "bwd" of rows of C.

    Up to 1024 features a warp owns a row, so that its sums need no shared memory: 32 elements a
    lane. Longer rows get a program each: 8 elements a lane in the forward, 16 in the backward,
    which spills a little at 8 where the compiler aims for more programs on an SM.
    """
    block = triton.next_power_of_2(C)
    if block <= 1024:
        return RowTile(ROWS=4, num_warps=4)
    return RowTile(ROWS=1, num_warps=min(block // (256 if kernel == "fwd" else 512), 16))


GELU_BLOCK, GELU_WARPS = 2048, 4  # 16 elements a lane: two 16-byte loads of half precision


class BiasTile(NamedTuple):
    ROWS: int
    BLOCK_C: int
    num_warps: int


def bias_gelu_config(C: int) -> BiasTile:
    """Two rows of 1024 columns: as GELU_BLOCK, and the bias is read once for both."""
    block = min(triton.next_power_of_2(C), 1024)
    return BiasTile(ROWS=GELU_BLOCK // 1024, BLOCK_C=block, num_warps=GELU_WARPS)


# 50257 logits in 13 steps of 4096: 16 a lane, a reduction across 8 warps each.
CROSS_ENTROPY_BLOCK, CROSS_ENTROPY_WARPS = 4096, 8


# Keys that a program of decode_attention owns: a cache of 1024 rows gives 4 programs a head, 48 for
# GPT-2 at batch 1. The pieces' sums are added in a loop, so that few are better at long caches.
DECODE_PIECE, DECODE_BLOCK_N, DECODE_WARPS = 256, 64, 4


def resident_programs(device: torch.device, tiles: int, columns: int = 1) -> int:
    """How many programs walk `tiles` row tiles: four for each SM, shared among column blocks.

    Enough warps to hide memory latency, few enough partial sums that adding them costs little. In
    the interpreter a few, so that every one of them walks more than one tile.
    """
    sms = _properties(device.index).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(tiles, 4 * sms // columns))


@functools.cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(index)
