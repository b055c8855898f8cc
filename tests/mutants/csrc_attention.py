"""Bugs to plant in csrc's attention.

Not in the list: a workspace that two threads share, which fails now and then.
"""

from . import Mutant

FORWARD_H = "csrc/cpu/attention.h"
BACKWARD_H = "csrc/cpu/attention_bwd.h"
COMMON_H = "csrc/cpu/attention_common.h"
DECODE_H = "csrc/cpu/decode_attention.h"
GEMM_H = "csrc/cpu/gemm.h"
TRANSPOSE_H = "csrc/cpu/transpose.h"
DOT_H = "csrc/cpu/dot_bf16.h"
DROPOUT_H = "csrc/cpu/dropout.h"
OPS_ATTENTION_CPP = "csrc/ops/attention.cpp"
HEADS_H = "csrc/ops/heads.h"

ATTENTION_MUTANTS = [
    # forward: which keys a query sees
    Mutant(
        "a query does not see its own key", FORWARD_H,
        "sees = i0 + 1 + x.Tk - x.Tq;", "sees = i0 + x.Tk - x.Tq;",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "first query aligned with first key", FORWARD_H,
        "sees = i0 + 1 + x.Tk - x.Tq;", "sees = i0 + 1;",
        "test_attention.py::test_last_query_meets_last_key[cpu-avx2-65-200-D16-fp32-]",
    ),
    Mutant(
        "a tile ends before its last query's key", FORWARD_H,
        "keys = at_most(kKeys, sees + r0 + n - 1 - j0);",
        "keys = at_most(kKeys, sees + r0 + n - 2 - j0);",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "the first query's keys are the block's", FORWARD_H,
        "j0 < sees + rows - 1; j0 += kKeys", "j0 < sees; j0 += kKeys",
        "test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-]",
    ),
    Mutant(
        "powers above the diagonal", FORWARD_H,
        "power_of(first(sees - j, exp2_below((V::load(s + j) - m_r) * scale), "
        "V::set(0)));",
        "power_of(exp2_below((V::load(s + j) - m_r) * scale));",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "a maximum above the diagonal", FORWARD_H,
        "top = max(top, first(sees - j, V::load(s + j), lowest));",
        "top = max(top, V::load(s + j));",
        "test_attention_hazards.py::test_no_row_depends_on_a_later_key[cpu-avx2-0-huge-fp32]",
    ),
    Mutant(
        "what is not seen is not zero", FORWARD_H,
        "for (; j < round_up(keys, V::W); j += V::W) V::set(0).store(p + j);", "",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    # forward: the online softmax and its scales
    Mutant(
        "acc not rescaled", FORWARD_H,
        "product<P, Into::kRescale>(n, ld, values);", "product<P, Into::kAdd>(n, ld, values);",
        "test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-]",
    ),
    Mutant(
        "l not rescaled", FORWARD_H,
        "l[r] = l[r] * block.alpha[r] + sum.sum();", "l[r] = l[r] + sum.sum();",
        "test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-]",
    ),
    Mutant(
        "a maximum that starts at -inf", COMMON_H,
        "sizeof(S) == 4 ? S(-__FLT_MAX__) : S(-__DBL_MAX__);", "-S(INFINITY);",
        "test_attention_hazards.py::test_scores_of_minus_infinity[cpu-avx2]",
    ),
    Mutant(
        "natural scale in powers of two", FORWARD_H,
        "scale_log2 = S(x.softmax_scale * kLog2E);", "scale_log2 = S(x.softmax_scale);",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "scale folded into the maximum", FORWARD_H,
        "power_of(exp2_below((V::load(s + j) - m_r) * scale));",
        "power_of(exp2_below(fma(V::load(s + j), scale, V::set(0) - m_r * scale)));",
        "test_attention_hazards.py::test_huge_scores[cpu-avx2-fp32]",
    ),
    Mutant(
        "lse in powers of two", FORWARD_H,
        "block.m[r] * scale_log2 * S(kLn2) +", "block.m[r] * scale_log2 +",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    # backward
    Mutant(
        "delta left out", BACKWARD_H,
        "V ds = p * (grad - delta);", "V ds = p * grad;",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "delta without the tail of D", BACKWARD_H,
        "if (d < x.D) sum = fma(V::load(a + d, x.D - d), V::load(b + d, x.D - d), sum);", "",
        "test_attention.py::test_any_head_size_on_a_cpu[cpu-avx2-D17-T33-fp32-]",
    ),
    Mutant(
        "lse taken for powers of two", BACKWARD_H,
        "lse[bh * x.Tq + i] * S(kLog2E);", "lse[bh * x.Tq + i];",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dq not scaled", BACKWARD_H,
        "write(head.dq + i0 * packed.ld, S(x.softmax_scale),",
        "write(head.dq + i0 * packed.ld, 1,",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk not scaled", BACKWARD_H,
        "write(block.dk, S(x.softmax_scale),", "write(block.dk, 1,",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk dv start after the diagonal", BACKWARD_H,
        "at_least(0, j0 + k0 - (x.Tk - x.Tq) - i0)",
        "at_least(0, j0 + k0 + 1 - (x.Tk - x.Tq) - i0)",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk dv without the last query", BACKWARD_H,
        "if (sees >= rows) break;", "if (sees + 1 >= rows) break;",
        "test_attention.py::test_short[cpu-avx2-T1-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk dv start at the first query's own key", BACKWARD_H,
        "first_query = at_least(0, j0 - (x.Tk - x.Tq));", "first_query = j0;",
        "test_attention.py::test_last_query_meets_last_key[cpu-avx2-65-200-D16-fp32-]",
    ),
    Mutant(
        "ds above the diagonal", BACKWARD_H,
        "ds = first(visible - j, ds, V::set(0));", "",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dq starts from what was there", BACKWARD_H,
        "for (int64_t i = begin * ld; i < end * ld; i += V::W) V::set(0).store(head.dq + "
        "i);",
        "",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dv starts from the last block's", BACKWARD_H,
        "V::set(0).store(block.dv + i);", "",
        "test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-]",
    ),
    Mutant(
        "tiles keep what is not seen", BACKWARD_H,
        "    zero(block, at, j);\n"
        "  }\n"
        "\n",
        "  }\n"
        "\n",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    # dropout
    Mutant(
        "kept powers not scaled", FORWARD_H,
        "V::set(S(dropout.scale) / block.l[r])", "V::set(1 / block.l[r])",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "l of what is kept", FORWARD_H,
        "sum = sum + power;\n"
        "        if (dropout.active()) power = power * V::load(block.keep + j);",
        "if (dropout.active()) power = power * V::load(block.keep + j);\n"
        "        sum = sum + power;",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "every block drops like the first", FORWARD_H,
        "dropout.keep(bh, i + r, j0,", "dropout.keep(bh, i + r, 0,",
        "test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-drop]",
    ),
    Mutant(
        "dp of dropped powers", BACKWARD_H,
        "grad = grad * keep;", "",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "dv of dropped powers", BACKWARD_H,
        "dropped = p * keep;", "",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "one mask for all heads", DROPOUT_H,
        "uint32_t(i), uint32_t(bh), 0}", "uint32_t(i), 0, 0}",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "half of the seed", DROPOUT_H,
        "uint32_t(uint64_t(seed) >> 32)}", "0}",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "six rounds", DROPOUT_H,
        "round < 7;", "round < 6;",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "probabilities of 23 bits", DROPOUT_H,
        "word[w] >> 8 >= threshold", "word[w] >> 9 >= threshold",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-drop]",
    ),
    # products and packing
    Mutant(
        "a tile of too few vectors", GEMM_H,
        "(at_most(columns, kPanel<V>) + V::W - 1) / V::W", "at_most(columns, kPanel<V>) / V::W",
        "test_attention.py::test_short[cpu-avx2-T63-D64-contiguous-fp32-]",
    ),
    Mutant(
        "products not added", GEMM_H,
        "if constexpr (into == Into::kAdd) acc[m][n] = V::load(c) + acc[m][n];", "",
        "test_attention.py::test_several_blocks[cpu-avx2-T777-D64-fp32-]",
    ),
    Mutant(
        "the same strip for every panel", GEMM_H,
        "x.b += x.b_strip;", "",
        "test_attention.py::test_short[cpu-avx2-T63-D64-contiguous-fp32-]",
    ),
    Mutant(
        "the edge of a transpose", GEMM_H,
        "to[j * to_ld + i] = from[i * ld + j];", "",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "what is beyond D is not zero", GEMM_H,
        "for (; d < ld; d += V::W) V::load(from + d, D - d).store(to + d);",
        "for (; d < D; d += V::W) V::load(from + d).store(to + d);",
        "test_attention.py::test_any_head_size_on_a_cpu[cpu-avx512_bf16-D17-T33-bf16-]",
    ),
    Mutant(
        "a transpose with two rows exchanged", TRANSPOSE_H,
        "_mm256_storeu_ps(to + (half + 3) * to_ld, _mm256_shuffle_ps(b, d, 0xee));",
        "_mm256_storeu_ps(to + (half + 3) * to_ld, _mm256_shuffle_ps(b, d, 0x44));",
        "test_attention.py::test_short[cpu-avx2-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "an odd row has no zeros beside it", GEMM_H,
        "r + 1 < rows ? from[ld + d] : typename P::Element{};", "from[ld + d];",
        "test_attention.py::test_short[cpu-avx512_bf16-T17-D16-contiguous-bf16-]",
    ),
    Mutant(
        "pairs in the wrong order", GEMM_H,
        "to[2 * d] = from[d];", "to[2 * d] = from[ld + d];",
        "test_attention.py::test_short[cpu-avx512_bf16-T17-D16-contiguous-bf16-]",
    ),
    Mutant(
        "every pair is the first", DOT_H,
        "memcpy(&pair, a, 4);", "memcpy(&pair, a, 2), pair &= 0xffff, pair |= pair << 16;",
        "test_attention.py::test_short[cpu-avx512_bf16-T17-D16-contiguous-bf16-]",
    ),
    # threads
    Mutant(
        "every head's queries meet the first head's keys", FORWARD_H,
        "f.queries(bh, i, memory.head(bh), block);", "f.queries(bh, i, memory.head(0), block);",
        "test_cpu.py::test_bits_do_not_depend_on_threads[cpu-avx2-causal_attention-fp32]",
    ),
    Mutant(
        "the last queries first, and only those", FORWARD_H,
        "i = (blocks - 1 - n / n_heads) * kQueries;", "i = (blocks - 1) * kQueries;",
        "test_cpu.py::test_bits_do_not_depend_on_threads[cpu-avx2-causal_attention-fp32]",
    ),
    Mutant(
        "a block of queries ends before its diagonal", BACKWARD_H,
        "j0 < i0 + rows + x.Tk - x.Tq; j0 += kKeys", "j0 < i0 + x.Tk - x.Tq; j0 += kKeys",
        "test_cpu.py::test_bits_do_not_depend_on_threads[cpu-avx2-causal_attention-fp32]",
    ),
    # one token per sequence
    Mutant(
        "keys beyond a length", DECODE_H,
        "at_most(F::kSplit, keys - j0)", "at_most(F::kSplit, x.T - j0)",
        "test_decode_attention.py::test_several_pieces[cpu-avx2-D64-fp32]",
    ),
    Mutant(
        "products without the tail of D", DECODE_H,
        "for (; d < x.D; d += V::W) even = fma(V::load(q + d), V::load(k + d, x.D - d), "
        "even);",
        "",
        "test_decode_attention.py::test_decode[cpu-avx2-B1-T17-D7-fp32]",
    ),
    Mutant(
        "pieces added as they are", DECODE_H,
        "l += factor * acc[ld + 1];", "l += acc[ld + 1];",
        "test_decode_attention.py::test_several_pieces[cpu-avx2-D64-fp32]",
    ),
    Mutant(
        "a piece too many", DECODE_H,
        "used = (x.keys(b) + kSplit - 1) / kSplit;", "used = x.keys(b) / kSplit + 1;",
        "test_decode_attention.py::test_decode[cpu-avx2-B1-T256-D64-fp32]",
    ),
    Mutant(
        "scores past the last are zero", DECODE_H,
        "++j) s[j] = -S(INFINITY);", "++j) s[j] = 0;",
        "test_decode_attention.py::test_decode[cpu-avx2-B1-T17-D16-fp32]",
    ),
    Mutant(
        "no keys give NaN", DECODE_H,
        "used == 0 ? S(0) : 1 / l", "1 / l",
        "test_decode_attention.py::test_no_keys_give_zeros_and_nan_stays[cpu-avx2]",
    ),
    # views
    Mutant(
        "values read where the keys are", OPS_ATTENTION_CPP,
        ".v = view_of(qkv, 2, C, D),", ".v = view_of(qkv, 1, C, D),",
        "test_attention.py::test_packed[cpu-avx2-2-17-3-D16-fp32-]",
    ),
    Mutant(
        "dv written over dk", OPS_ATTENTION_CPP,
        "out_view_of(dqkv, 2, C, x.D),", "out_view_of(dqkv, 1, C, x.D),",
        "test_attention.py::test_packed[cpu-avx2-2-17-3-D16-fp32-]",
    ),
    Mutant(
        "stride-0 gradient read as contiguous", HEADS_H,
        "if (x.stride(last) != 1 && x.size(last) != 1)",
        "if (x.stride(last) > 1 && x.size(last) != 1)",
        "test_attention.py::test_backward_twice_and_stride_0_gradients[cpu-avx2]",
    ),
]  # fmt: skip
