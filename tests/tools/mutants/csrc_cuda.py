"""Bugs to plant in csrc/cuda. Its tests run on the emulator (tests/tools/ptx_emulator), which
detects what the interpreter cannot: lost barriers, races, copies without a wait.

Not in the list: races in global memory, which the emulator does not detect.
"""

from . import Mutant

HEADS_H = "csrc/ops/heads.h"
NORM_CUH = "csrc/cuda/layer_norm.cuh"

MMA = "csrc/cuda/mma.cuh"
COMMON = "csrc/cuda/attention.cuh"
FORWARD = "csrc/cuda/attention.cu"
BACKWARD = "csrc/cuda/attention_bwd.cu"
DECODE = "csrc/cuda/decode_attention.cu"
REDUCE = "csrc/cuda/reduce.cuh"
GELU = "csrc/cuda/gelu.cu"
LOSS = "csrc/cuda/cross_entropy.cu"

PACKED = "kernels/test_attention.py::test_packed[cuda-1-130-1-D64-{}-]"
SHORT = "kernels/test_attention.py::test_short[cuda-T{}-D64-packed-{}-{}]"

CUDA_MUTANTS = [
    # shared memory and the copies into it
    Mutant(
        "forward: no barrier after the wait", FORWARD,
        "    __syncthreads();  // this tile has arrived, and no thread reads the last one\n", "",
        PACKED.format("bf16"),
    ),
    Mutant(
        "rows past the end are stored", COMMON,
        "if (first + row < rows && chunk * Rows::kChunk < columns) {",
        "if (chunk * Rows::kChunk < columns) {",
        SHORT.format(17, "fp16", ""),
    ),
    # products
    Mutant(
        "the halves of a left fragment swapped", MMA,
        "tile.chunk(row + 16 * m + lane % 16, 2 * k + lane / 16)",
        "tile.chunk(row + 16 * m + lane % 16, 2 * k + (1 - lane / 16))",
        PACKED.format("bf16"),
    ),
    Mutant(
        "float32: a swizzle left out", MMA,
        "(2 * d ^ k & 6) * 4", "2 * d * 4",
        PACKED.format("fp32"),
    ),
    # forward
    Mutant(
        "first query aligned with first key", COMMON,
        "return query + Tk - Tq;", "return query;",
        "kernels/test_attention.py::test_last_query_meets_last_key[cuda-17-64-D64-bf16-]",
    ),
    Mutant(
        "acc is not rescaled", FORWARD,
        "acc[i][d][e] *= alpha[i][e / 2];", "",
        PACKED.format("bf16"),
    ),
    # backward
    Mutant(
        "dk dv pass: mask one off", BACKWARD,
        "hides(start + column, key)", "hides(start + column, key + 1)",
        SHORT.format(17, "bf16", ""),
    ),
    # dropout
    Mutant(
        "dropout: the transposed mask is not transposed", COMMON,
        "(lane & ~12) | e << 2", "lane",
        SHORT.format(17, "bf16", "drop"),
    ),
    # decode
    Mutant(
        "decode: keys past the length have weight", DECODE,
        "if (j + i * kGroups >= range.end) s[i] = -INFINITY;", "",
        "kernels/test_decode_attention.py::test_decode[cuda-B3-T17-D64-bf16]",
    ),
    # what the kernels are given
    Mutant(
        "misaligned rows are read in place", HEADS_H,
        "return rows_are_aligned(x) ? x :", "return x.defined() ? x :",
        "kernels/test_cuda.py::test_misaligned_views_are_copied[cuda-1-fp32]",
    ),
    # rows
    Mutant(
        "a block's sum read before all warps have written", REDUCE,
        "  __syncthreads();\n  // Every warp", "  // Every warp",
        "kernels/test_layer_norm.py::test_layer_norm[cuda-C1600-N3-fp32-same]",
    ),
    Mutant(
        "layer_norm: columns past the end are read", NORM_CUH,
        "if (c < C) f(i, c);", "f(i, c);",
        "kernels/test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "gelu: elements past the end", GELU,
        "if (i + L <= n) {", "if (i < n) {",
        "kernels/test_gelu.py::test_gelu[cuda-1.0-17-fp32]",
    ),
    Mutant(
        "cross_entropy: sum not rescaled", LOSS,
        "fmaf(l, exp2_fast(kLog2e * (m - top)), sum)", "l + sum",
        "kernels/test_cross_entropy.py::test_cross_entropy[cuda-20.0-V9001-N3-fp32-none]",
    ),
    Mutant(
        "cross_entropy: another thread's part of a row read before it has arrived", LOSS,
        "    __syncthreads();  // every thread's part", "    // every thread's part",
        "kernels/test_cross_entropy_rows.py::test_more_long_rows_than_multiprocessors[cuda-bf16-0.0]",
    ),
]  # fmt: skip
