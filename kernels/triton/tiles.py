"""Tiles and launch shapes, with the reason for each. A table, not an autotuner: no start-up cost,
the same bits every time, and every rank of a job takes the same kernel.

Measured on one NVIDIA H200 (torch 2.11, Triton 3.6, 2026-11-27, docs/log.md): the entries that give
microseconds, each the kernel's own time in a CUDA graph, in bfloat16. The other entries have not
been timed: they are the largest tiles that the compiler turns into code without spills and within
99 KiB of shared memory, which every GPU from compute capability 8.0 on has; Hopper's own may take
its 227 KiB. tests/builds/test_compile.py holds every entry to that.
"""

import functools
from typing import NamedTuple

import torch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes a microsecond."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


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

# On Hopper. Microseconds on the H200 at B x T = 16 x 1024 and 4 x 4096, 12 heads of 64 or 6 of 128,
# beside the tile that was used before:
#
#   D = 64     fwd       (64, 64, 4, 3)   100, 311    (128, 64, 4, 3)   107, 324
#              bwd_dq    (64, 64, 4, 3)   108, 319    (128, 64, 8, 2)   125, 375
#              bwd_dkdv  (32, 64, 4, 3)   158, 541    (64, 128, 8, 2)   225, -
#   dropout    fwd       (64, 64, 4, 3)   203, 676    (128, 64, 8, 3)   230, 733
#              bwd_dq    (64, 64, 4, 3)   206, 660    (128, 64, 8, 2)   278, 848
#              bwd_dkdv  (32, 64, 4, 2)   297, 1010   (64, 128, 8, 2)   342, 1082
#   D = 128    fwd       (128, 64, 8, 3)   99, 282    (128, 64, 8, 2)   123, 367
#              bwd_dq    (64, 64, 4, 2)   115, 329    (128, 32, 8, 2)   194, 593
#
# Three tiles of bwd_dkdv spill and are left out: (128, 64, 4, 2), 185, 523; with dropout
# (64, 64, 4, 2), 286, 975; with D = 128 (64, 64, 4, 2), 160, 484, where the tile of other GPUs is
# used, 166, 528.
_HALF_HOPPER = {
    ("fwd", False): {64: AttentionTile(64, 64, 4, 3), 128: AttentionTile(128, 64, 8, 3)},
    ("fwd", True): {64: AttentionTile(64, 64, 4, 3)},
    ("bwd_dq", False): {64: AttentionTile(64, 64, 4, 3), 128: AttentionTile(64, 64, 4, 2)},
    ("bwd_dq", True): {64: AttentionTile(64, 64, 4, 3)},
    ("bwd_dkdv", False): {64: AttentionTile(32, 64, 4, 3)},
    ("bwd_dkdv", True): {64: AttentionTile(32, 64, 4, 2)},
}

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
    hopper = _HALF_HOPPER[kernel, dropout] if is_hopper(device) else {}
    return hopper.get(D) or _HALF[kernel, dropout][D]


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and _properties(device.index).major == 9


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: exactly, unless PyTorch itself is allowed TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


class RowTile(NamedTuple):
    ROWS: int
    BLOCK_C: int
    num_warps: int
    num_stages: int = 1  # of a backward: rows are loaded num_stages - 1 steps ahead
    per_sm: int = 0  # of a backward: programs that walk the rows, for each SM


def layer_norm_config(kernel: str, C: int) -> RowTile:
    """ "fwd" or "bwd" of rows of C, in blocks of columns: 16 elements a lane in the forward, 4 in
    the backward.

    Backward on the H200, alone, with the residual, and with the residual in float32, in
    microseconds; (ROWS, num_warps, num_stages, per_sm):

        65536 x 768     (2, 4, 3, 4)    83, 105, 186    (4, 8, 3, 2)    89, 108
                        (4, 4, 3, 3)   103, 122, 205    (2, 4, 2, 5)    96

    Rows of more than 2048 have not been timed. In the forward 16 warps would spill there.
    """
    block = next_power_of_2(C)
    if kernel == "fwd":
        rows, warps = (4, 2) if block <= 1024 else (2, 4)
        if block > 2048:
            rows, warps = 1, min(block // 512, 8)
        return RowTile(rows, min(block, warps * 512 // rows), warps)
    rows, warps = 2 if block <= 1024 else 1, max(4, min(block // 512, 16))
    stages = 3 if block <= 2048 else 1
    per_sm = 4 if C <= 768 else 3 if block <= 2048 else 1  # what fits into 64 Ki registers
    return RowTile(rows, min(block, warps * 128 // rows), warps, stages, per_sm)


# Of sum_partial. 792 rows of 768, three sums, on the H200: 3.5 µs, 6.0 with (128, 64, 8), and 9.7
# by PyTorch's sum.
PARTIAL_ROWS, PARTIAL_BLOCK_C, PARTIAL_WARPS = 256, 16, 8


# 16 elements a lane: two 16-byte loads of half precision. At 65536 x 3072 on the H200 191 µs, the
# rate of a copy; 1024 to 8192 elements in 4 warps are within 4 % of it.
GELU_BLOCK, GELU_WARPS = 2048, 4


class BiasTile(NamedTuple):
    ROWS: int
    BLOCK_C: int
    num_warps: int


class Residents(NamedTuple):
    per_sm: int  # programs that walk the rows, for each SM
    maxnreg: int | None  # registers of a thread, so that all of them fit


def bias_gelu_residents(dtype: torch.dtype) -> Residents:
    """Programs of the backward. 65536 registers are 64 for each thread of 8 programs of 4 warps;
    float32 would spill at 64.

    At 32768 x 3072 in bfloat16 on the H200, a prototype with 59 registers took 162 µs, and this
    kernel with 4 programs and 72 registers 233. Loads ahead of their use, in registers (161) or in
    shared memory (168), gained nothing.
    """
    return Residents(4, None) if dtype == torch.float32 else Residents(8, 64)


def bias_gelu_config(C: int) -> BiasTile:
    """Two rows of 1024 columns: as GELU_BLOCK, and the bias is read once for both."""
    block = min(next_power_of_2(C), 1024)
    return BiasTile(ROWS=GELU_BLOCK // 1024, BLOCK_C=block, num_warps=GELU_WARPS)


class VocabularyTile(NamedTuple):
    BLOCK_V: int
    num_warps: int


# 16 logits a thread: two 16-byte loads in half precision, none ahead of their use. Prototypes of
# these kernels at 8192 x 50257 on the H200: the forward 196 µs, the rate of a copy; both in place
# 521, with the row in registers 556. The backward has not been timed.
_CROSS_ENTROPY = {
    "fwd": VocabularyTile(4096, 8),
    "bwd": VocabularyTile(4096, 8),
    "fwd_bwd": VocabularyTile(8192, 16),
}


def cross_entropy_config(kernel: str) -> VocabularyTile:
    """The tile of "fwd", "bwd" or, for both in place, "fwd_bwd"."""
    return _CROSS_ENTROPY[kernel]


# Keys that a program of decode_attention owns: a cache of 1024 rows gives 8 programs a head, 96 for
# GPT-2 at batch 1. The sums of the splits are added in a loop, so long caches want few splits. On
# the H200, a full cache of 1024 rows at B = 1, 8, 64: 7, 12, 79 µs; 256 keys 10, 13, 83; 64 keys, a
# single step of BLOCK_N, 6, 12, 68.
DECODE_SPLIT, DECODE_BLOCK_N, DECODE_WARPS = 128, 64, 4


def resident_programs(device: torch.device, tiles: int, per_sm: int, columns: int = 1) -> int:
    """How many programs walk `tiles` row tiles: per_sm for each SM, shared among column blocks.

    Enough warps to hide memory latency, few enough partial sums that adding them costs little. In
    the interpreter a few, so that every one of them walks more than one tile.
    """
    sms = _properties(device.index).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(tiles, per_sm * sms // columns))


@functools.cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(index)
