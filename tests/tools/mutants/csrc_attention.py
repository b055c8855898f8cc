"""Bugs to plant in csrc's attention.

Not in the list: a workspace that two threads share, because it fails only sometimes.
"""

from . import Mutant

HEADS_H = "csrc/ops/heads.h"

FORWARD_H = "csrc/cpu/attention.h"
BACKWARD_H = "csrc/cpu/attention_bwd.h"
COMMON_H = "csrc/cpu/attention_common.h"
DECODE_H = "csrc/cpu/decode_attention.h"
GEMM_H = "csrc/cpu/gemm.h"
DROPOUT_H = "csrc/cpu/dropout.h"

ATTENTION_MUTANTS = [
    # forward: which keys a query sees
    Mutant(
        "first query aligned with first key", FORWARD_H,
        "sees = i0 + 1 + x.Tk - x.Tq;", "sees = i0 + 1;",
        "kernels/test_attention.py::test_last_query_meets_last_key[cpu-avx2-65-200-D16-fp32-]",
    ),
    Mutant(
        "a maximum above the diagonal", FORWARD_H,
        "top = max(top, first(sees - j, V::load(s + j), lowest));",
        "top = max(top, V::load(s + j));",
        "kernels/test_attention_hazards.py::test_no_row_depends_on_a_later_key[cpu-avx2-0-huge-fp32]",
    ),
    # forward: the online softmax and its scales
    Mutant(
        "acc not rescaled", FORWARD_H,
        "product<P, Into::kRescale>(n, ld, values);", "product<P, Into::kAdd>(n, ld, values);",
        "kernels/test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-]",
    ),
    Mutant(
        "a maximum that starts at -inf", COMMON_H,
        "sizeof(S) == 4 ? S(-__FLT_MAX__) : S(-__DBL_MAX__);", "-S(INFINITY);",
        "kernels/test_attention_hazards.py::test_scores_of_minus_infinity[cpu-avx2]",
    ),
    # backward
    Mutant(
        "delta without the tail of D", BACKWARD_H,
        "if (d < x.D) sum = fma(V::load(a + d, x.D - d), V::load(b + d, x.D - d), sum);", "",
        "kernels/test_attention.py::test_any_head_size_on_a_cpu[cpu-avx2-D17-T33-fp32-]",
    ),
    # dropout
    Mutant(
        "one mask for all heads", DROPOUT_H,
        "uint32_t(i), uint32_t(bh), 0}", "uint32_t(i), 0, 0}",
        "kernels/test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    # products and packing
    Mutant(
        "the same strip for every panel", GEMM_H,
        "x.b += x.b_strip;", "",
        "kernels/test_attention.py::test_short[cpu-avx2-T63-D64-contiguous-fp32-]",
    ),
    Mutant(
        "pairs in the wrong order", GEMM_H,
        "to[2 * d] = from[d];", "to[2 * d] = from[ld + d];",
        "kernels/test_attention.py::test_short[cpu-avx512_bf16-T17-D16-contiguous-bf16-]",
    ),
    # threads
    Mutant(
        "the last queries first, and only those", FORWARD_H,
        "i = (blocks - 1 - n / n_heads) * kQueries;", "i = (blocks - 1) * kQueries;",
        "kernels/test_cpu.py::test_bits_do_not_depend_on_threads[cpu-avx2-causal_attention-fp32]",
    ),
    # one token per sequence
    Mutant(
        "pieces added as they are", DECODE_H,
        "l += factor * acc[ld + 1];", "l += acc[ld + 1];",
        "kernels/test_decode_attention.py::test_several_pieces[cpu-avx2-D64-fp32]",
    ),
    # views
    Mutant(
        "stride-0 gradient read as contiguous", HEADS_H,
        "if (x.stride(last) != 1 && x.size(last) != 1)",
        "if (x.stride(last) > 1 && x.size(last) != 1)",
        "kernels/test_attention.py::test_backward_twice_and_stride_0_gradients[cpu-avx2]",
    ),
]  # fmt: skip
