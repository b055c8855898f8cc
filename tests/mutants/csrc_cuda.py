"""Bugs to plant in csrc/cuda, whose tests run on the emulator (tests/emulator), which sees what no
interpreter does: lost barriers, races, copies that nobody waited for.

Outcome on 2026-11-24: all 62 are killed, each by the test that is named beside it.

Not in the list: a race in global memory, which the emulator does not look for.
"""

from . import Mutant

MMA = "csrc/cuda/mma.cuh"
COMMON = "csrc/cuda/attention.cuh"
FORWARD = "csrc/cuda/attention.cu"
BACKWARD = "csrc/cuda/attention_bwd.cu"
DECODE = "csrc/cuda/decode_attention.cu"
REDUCE = "csrc/cuda/reduce.cuh"
PARTIAL = "csrc/cuda/partial.cuh"
NORM = "csrc/cuda/layer_norm.cu"
NORM_CUH = "csrc/cuda/layer_norm.cuh"
NORM_BWD = "csrc/cuda/layer_norm_bwd.cu"
GELU = "csrc/cuda/gelu.cu"
LOSS = "csrc/cuda/cross_entropy.cu"
HEADS_H = "csrc/ops/heads.h"

PACKED = "test_attention.py::test_packed[cuda-1-130-1-D64-{}-]"
SHORT = "test_attention.py::test_short[cuda-T{}-D64-packed-{}-{}]"

CUDA_MUTANTS = [
    # shared memory and the copies into it
    Mutant(
        "forward: nobody waits for the copies", FORWARD,
        "    cp_async_wait<0>();\n", "",
        PACKED.format("bf16"),
    ),
    Mutant(
        "forward: one group of copies too many may be pending", FORWARD,
        "cp_async_wait<0>();", "cp_async_wait<1>();",
        PACKED.format("bf16"),
    ),
    Mutant(
        "forward: no barrier after the wait", FORWARD,
        "    __syncthreads();  // this tile is here, and nobody reads the one before\n", "",
        PACKED.format("bf16"),
    ),
    Mutant(
        "forward: the next tile overwrites the present one", FORWARD,
        "start + Shape::kRead, Tk, scores.D, stage ^ 1);",
        "start + Shape::kRead, Tk, scores.D, stage);",
        PACKED.format("fp16"),
    ),
    Mutant(
        "copies are not committed", FORWARD,
        "    cp_async_commit();\n", "",
        PACKED.format("bf16"),
    ),
    Mutant(
        "rows past the end are copied", COMMON,
        "first + row < rows && chunk * Rows::kChunk < columns;\n    const T* source",
        "chunk * Rows::kChunk < columns;\n    const T* source",
        SHORT.format(17, "bf16", ""),
    ),
    Mutant(
        "columns past the head are copied", COMMON,
        "first + row < rows && chunk * Rows::kChunk < columns;\n    const T* source",
        "first + row < rows;\n    const T* source",
        "test_attention.py::test_short[cuda-T17-D80-contiguous-bf16-]",
    ),
    Mutant(
        "rows past the end are stored", COMMON,
        "if (first + row < rows && chunk * Rows::kChunk < columns) {",
        "if (chunk * Rows::kChunk < columns) {",
        SHORT.format(17, "fp16", ""),
    ),
    Mutant(
        "a warp reads its rows before it has written them", COMMON,
        "  __syncwarp();\n  for_chunks<Rows, 16 * MT, kWarp>", "  for_chunks<Rows, 16 * MT, kWarp>",
        PACKED.format("bf16"),
    ),
    Mutant(
        "shared memory one tile too small", FORWARD,
        "(Shape::kOwned + 4 * Shape::kRead)", "(Shape::kOwned + 3 * Shape::kRead)",
        PACKED.format("bf16"),
    ),
    # products
    Mutant(
        "the halves of a left fragment swapped", MMA,
        "tile.chunk(row + 16 * m + lane % 16, 2 * k + lane / 16)",
        "tile.chunk(row + 16 * m + lane % 16, 2 * k + (1 - lane / 16))",
        PACKED.format("bf16"),
    ),
    Mutant(
        "the halves of a right fragment swapped", MMA,
        "2 * k + lane / 8 % 2)", "2 * k + 1 - lane / 8 % 2)",
        PACKED.format("bf16"),
    ),
    Mutant(
        "p's rows swapped", MMA,
        "&P[m][2 * k + i / 2][i % 2 * 2]", "&P[m][2 * k + i / 2][2 - i % 2 * 2]",
        PACKED.format("bf16"),
    ),
    Mutant(
        "p's tiles swapped", MMA,
        "&P[m][2 * k + i / 2]", "&P[m][2 * k + 1 - i / 2]",
        PACKED.format("fp16"),
    ),
    Mutant(
        "values read untransposed", MMA,
        "ldmatrix_trans(b, B.chunk", "ldmatrix(b, B.chunk",
        PACKED.format("bf16"),
    ),
    Mutant(
        "float32: the wrong neighbour's p", MMA,
        "k % 8 / 2, 4);", "k % 4, 4);",
        PACKED.format("fp32"),
    ),
    Mutant(
        "float32: a swizzle left out", MMA,
        "(2 * d ^ k & 6) * 4", "2 * d * 4",
        PACKED.format("fp32"),
    ),
    Mutant(
        "float32: one component of four left out", MMA,
        "          c = fmaf(a[m][i / 2].w, b.w, c);\n", "",
        PACKED.format("fp32"),
    ),
    # forward
    Mutant(
        "a query does not see its own key", COMMON,
        "return key > last_key(query);",
        "return key >= last_key(query);",
        SHORT.format(17, "bf16", ""),
    ),
    Mutant(
        "no mask in the tiles that the diagonal crosses first", COMMON,
        "return start + n > past_end;", "return start > past_end;",
        PACKED.format("bf16"),
    ),
    Mutant(
        "first query aligned with first key", COMMON,
        "return query + Tk - Tq;", "return query;",
        "test_attention.py::test_last_query_meets_last_key[cuda-17-64-D64-bf16-]",
    ),
    Mutant(
        "l is not rescaled", COMMON,
        "    l *= alpha;\n", "",
        PACKED.format("bf16"),
    ),
    Mutant(
        "acc is not rescaled", FORWARD,
        "acc[i][d][e] *= alpha[i][e / 2];", "",
        PACKED.format("bf16"),
    ),
    Mutant(
        "scaled twice", COMMON,
        "return exp2_fast((s - m) * scale_log2);",
        "return exp2_fast((s - m) * scale_log2 * scale_log2);",
        PACKED.format("bf16"),
    ),
    Mutant(
        "scaled before the maximum is subtracted", COMMON,
        "return exp2_fast((s - m) * scale_log2);",
        "return exp2_fast(fmaf(s, scale_log2, -m * scale_log2));",
        "test_attention_hazards.py::test_huge_scores[cuda-fp32]",
    ),
    Mutant(
        "maximum of two lanes of four", MMA,
        "return fmaxf(x, __shfl_xor_sync(~0u, x, 2));", "return x;",
        PACKED.format("bf16"),
    ),
    Mutant(
        "sum of two lanes of four", MMA,
        "return x + __shfl_xor_sync(~0u, x, 2);", "return x;",
        PACKED.format("bf16"),
    ),
    Mutant(
        "maximum starts at -inf", COMMON,
        "kLowest = -3.40282347e38f;", "kLowest = -INFINITY;",
        "test_attention_hazards.py::test_scores_of_minus_infinity[cuda]",
    ),
    # backward
    Mutant(
        "dq pass: delta left out", BACKWARD,
        "p[i][n][e] * (dp - delta[i][e / 2]);", "p[i][n][e] * dp;",
        PACKED.format("bf16"),
    ),
    Mutant(
        "dq pass: no mask", BACKWARD,
        "if (masked && scores.mask.hides(query, key)) p[i][n][e] = 0;", "",
        SHORT.format(17, "fp32", ""),
    ),
    Mutant(
        "dq not scaled", BACKWARD,
        "store_rows(\n      dq, [&](int, int) { return scores.scale; }",
        "store_rows(\n      dq, [&](int, int) { return 1.0f; }",
        SHORT.format(17, "bf16", ""),
    ),
    Mutant(
        "dk dv pass: begins a tile late", COMMON,
        "max(first - offset, 0) / tile * tile,",
        "(max(first - offset, 0) / tile + 1) * tile,",
        PACKED.format("bf16"),
    ),
    Mutant(
        "dk dv pass: lse of the other stage", BACKWARD,
        "lse_of(stage)[column] * kLog2e", "lse_of(stage ^ 1)[column] * kLog2e",
        PACKED.format("bf16"),
    ),
    Mutant(
        "dk dv pass: lse and delta of rows past the end are read", BACKWARD,
        "const bool valid = start + row < rows;", "const bool valid = true;",
        SHORT.format(17, "bf16", ""),
    ),
    Mutant(
        "dk dv pass: mask one off", BACKWARD,
        "hides(start + column, key)", "hides(start + column, key + 1)",
        SHORT.format(17, "bf16", ""),
    ),
    # dropout
    Mutant(
        "dropout: a round of Philox missing", COMMON,
        "round < 7;", "round < 6;",
        SHORT.format(17, "bf16", "drop"),
    ),
    Mutant(
        "dropout: lanes keep each other's rows", COMMON,
        "top = from == 0 ? mine : other", "top = from == 0 ? other : mine",
        SHORT.format(17, "bf16", "drop"),
    ),
    Mutant(
        "dropout: the transposed mask is not transposed", COMMON,
        "(lane & ~12) | e << 2", "lane",
        SHORT.format(17, "bf16", "drop"),
    ),
    Mutant(
        "dropout: what is kept is not scaled", COMMON,
        "return kept ? x * dropout_scale : 0.0f;", "return kept ? x : 0.0f;",
        SHORT.format(17, "bf16", "drop"),
    ),
    # decode
    Mutant(
        "decode: keys past the length have weight", DECODE,
        "if (j + i * kGroups >= range.end) s[i] = -INFINITY;", "",
        "test_decode_attention.py::test_decode[cuda-B3-T17-D64-bf16]",
    ),
    Mutant(
        "decode: keys past the length are read", DECODE,
        "min(j + i * kGroups, range.end - 1)", "j + i * kGroups",
        "test_decode_attention.py::test_decode[cuda-B1-T17-D64-bf16]",
    ),
    Mutant(
        "decode: no barrier before the warps are added", DECODE,
        "  __syncthreads();\n", "",
        "test_decode_attention.py::test_decode[cuda-B1-T257-D64-fp32]",
    ),
    Mutant(
        "decode: the first piece alone", DECODE,
        "j < keys; j += kSplit", "j < min(keys, int64_t(kSplit)); j += kSplit",
        "test_decode_attention.py::test_decode[cuda-B1-T257-D64-fp32]",
    ),
    # what the kernels are given
    Mutant(
        "misaligned rows are read in place", HEADS_H,
        "return rows_are_aligned(x) ? x :", "return x.defined() ? x :",
        "test_cuda.py::test_misaligned_views_are_copied[cuda-1-fp32]",
    ),
    # rows
    Mutant(
        "a block's sum read before all warps have written", REDUCE,
        "  __syncthreads();\n  // Every warp", "  // Every warp",
        "test_layer_norm.py::test_layer_norm[cuda-C1600-N3-fp32-same]",
    ),
    Mutant(
        "a block's sum overwritten while it is read", REDUCE,
        "  __syncthreads();  // the last call's results have been read\n", "",
        "test_cuda.py::test_every_layer_norm_kernel[cuda-2048-fp32]",
    ),
    Mutant(
        "a warp's sum without its last step", REDUCE,
        "lanes > 0; lanes /= 2", "lanes > 1; lanes /= 2",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "partial sums without their barrier", PARTIAL,
        "  __syncthreads();\n", "",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "partial sums: a warp's rows twice", PARTIAL,
        "for (int i = 1; i < WARPS; ++i) sum +=", "for (int i = 0; i < WARPS; ++i) sum +=",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "layer_norm: columns past the end are read", NORM_CUH,
        "if (c < C) f(i, c);", "f(i, c);",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "layer_norm: rows past the end are read", NORM,
        "  if (n >= N) return;\n", "",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "layer_norm: eps left out", NORM,
        "(variance < 0 ? 0 : variance) + eps)", "(variance < 0 ? 0 : variance))",
        "test_layer_norm.py::test_constant_rows[cuda]",
    ),
    Mutant(
        "layer_norm: the residual's gradient is dropped", NORM_BWD,
        "if (kMixed || args.ds) load(args.ds + n * C + c, g);", "",
        "test_layer_norm.py::test_add_layer_norm[cuda-C17-N5-fp32-same]",
    ),
    Mutant(
        "layer_norm: 16 bytes at a time at any address", NORM,
        "are_aligned(x, residual, weight, bias, y, s) && C % kLanes<R> == 0;",
        "C > 0;",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "layer_norm: teams do not wait for each other", NORM_BWD,
        "      __syncthreads();\n", "",
        "test_layer_norm.py::test_layer_norm[cuda-C17-N3-fp32-same]",
    ),
    Mutant(
        "gelu: elements past the end", GELU,
        "if (i + L <= n) {", "if (i < n) {",
        "test_gelu.py::test_gelu[cuda-1.0-17-fp32]",
    ),
    Mutant(
        "gelu: the exact error function's constant", GELU,
        "kCubic = 0.044715f;", "kCubic = 0.0442f;",
        "test_gelu.py::test_gelu[cuda-1.0-17-fp32]",
    ),
    Mutant(
        "cross_entropy: sum not rescaled", LOSS,
        "      sum.l *= exp2_fast(kLog2e * (sum.m - top));\n", "",
        "test_cross_entropy.py::test_cross_entropy[cuda-20.0-V9001-N3-fp32-none]",
    ),
    Mutant(
        "cross_entropy: a row's head twice", LOSS,
        "threadIdx.x < head) f(", "threadIdx.x <= head) f(",
        "test_cross_entropy.py::test_cross_entropy[cuda-1.0-V257-N3-fp32-none]",
    ),
    Mutant(
        "cross_entropy: one-hot left out", LOSS,
        "x[k] -= k == target - v ? 1 - e : 0;", "x[k] -= 0;",
        "test_cross_entropy.py::test_leading_shapes[cuda-(2, 3)]",
    ),
    Mutant(
        "cross_entropy: ignored rows have a gradient", LOSS,
        "  if (target == rows.ignore_index) {\n    store_zeros(drow",
        "  if (false) {\n    store_zeros(drow",
        "test_cross_entropy.py::test_ignored_rows_add_nothing[cuda]",
    ),
    Mutant(
        "cross_entropy: padding keeps its logits", LOSS,
        "  store_zeros(row + rows.V, V_padded - rows.V);\n", "",
        "test_cross_entropy.py::test_in_place_rows_touch_nothing_else[cuda-33-fp32]",
    ),
]  # fmt: skip
