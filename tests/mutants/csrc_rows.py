"""Bugs to plant in csrc's row kernels."""

from . import Mutant

GELU_H = "csrc/cpu/gelu.h"
NORM_H = "csrc/cpu/layer_norm.h"
LOSS_H = "csrc/cpu/cross_entropy.h"
ROWS_H = "csrc/cpu/rows.h"
VEC_H = "csrc/cpu/vec.h"
AVX2_H = "csrc/cpu/vec_avx2.h"
MATH_H = "csrc/cpu/vec_math.h"
OPS_LOSS_CPP = "csrc/ops/cross_entropy.cpp"

ROW_MUTANTS = [
    # gelu
    Mutant(
        "1 - g cancels", GELU_H,
        "(e * g) * g, g)", "(one - g) * g, g)",
        "test_gelu.py::test_gradient_on_the_right_keeps_its_accuracy[cpu-avx2]",
    ),
    Mutant(
        "another cubic", GELU_H,
        "kCubic = 0.044715", "kCubic = 0.0447",
        "test_gelu.py::test_gelu[cpu-avx2-1.0-255-fp32]",
    ),
    Mutant(
        "gradient overflows on the left", GELU_H,
        "left = V::set(-10)", "left = V::set(-100)",
        "test_gelu.py::test_extremes[cpu-avx2-fp32]",
    ),
    Mutant(
        "gradient is 1 too early", GELU_H,
        "right = V::set(10)", "right = V::set(2)",
        "test_gelu.py::test_gelu[cpu-avx2-1.0-255-fp32]",
    ),
    Mutant(
        "dbias without dy", GELU_H,
        "load<V>(dbias_partial + c, lanes) + d,", "load<V>(dbias_partial + c, lanes) + grad,",
        "test_gelu.py::test_bias_gelu[cpu-avx2-N33-C17-fp32-same]",
    ),
    # layer_norm
    Mutant(
        "variance over C - 1", NORM_H,
        "squares.sum() / C - rest", "squares.sum() / (C - 1) - rest",
        "test_layer_norm.py::test_ranks[cpu-avx2-shape1-fp32]",
    ),
    Mutant(
        "eps left out", NORM_H,
        "0 : variance) + eps)", "0 : variance))",
        "test_layer_norm.py::test_eps[cpu-avx2]",
    ),
    Mutant(
        "dx keeps its component along xhat", NORM_H,
        "- mean_wdy - xhat * mean_wdy_xhat)", "- mean_wdy)",
        "test_layer_norm.py::test_ranks[cpu-avx2-shape1-fp32]",
    ),
    Mutant(
        "gradient of the sum left out", NORM_H,
        "if (ds != nullptr) g = g + load<V>(ds + start + c, lanes);", "(void)ds;",
        "test_layer_norm.py::test_either_output_alone[cpu-avx2-both]",
    ),
    Mutant(
        "mean left as it was first rounded", NORM_H,
        "mean = first_mean + rest;", "mean = first_mean;",
        "test_layer_norm.py::test_mean_far_from_zero[cpu-scalar-1000.0-C127-fp32]",
    ),
    Mutant(
        "the residual is not normalised", NORM_H,
        "norm(s + row * C);", "norm(x + row * C);",
        "test_layer_norm.py::test_the_norm_sees_the_sum_as_it_is_stored[cpu-avx2]",
    ),
    Mutant(
        "the residual's gradient in 16 bits", NORM_H,
        "if (dresidual != nullptr) store(g, dresidual + start + c, lanes);",
        "if (dresidual != nullptr)"
        " store(load<V>(dx + start + c, lanes), dresidual + start + c, lanes);",
        "test_layer_norm.py::test_float32_stream_is_not_rounded[cpu-avx2-bf16]",
    ),
    # cross_entropy
    Mutant(
        "smoothing without its constant", LOSS_H,
        "off = V::set(-each * dloss)", "off = V::set(0)",
        "test_cross_entropy.py::test_reductions_and_smoothing"
        "[cpu-avx2-cross_entropy-V17-fp32-sum-0.1]",
    ),
    Mutant(
        "sum not rescaled", LOSS_H,
        "l = l * exp_minus(V::set(m), V::set(top.max()));", "",
        "test_cross_entropy.py::test_cross_entropy[cpu-avx2-20.0-V9001-N3-fp32-none]",
    ),
    Mutant(
        "a block of -inf", LOSS_H,
        "V::set(m == -INFINITY ? 0 : m)", "V::set(m)",
        "test_cross_entropy.py::test_minus_infinity_is_a_probability_of_zero[cpu-avx2]",
    ),
    Mutant(
        "one-hot left out", LOSS_H,
        "narrow((p - (1 - e) - each) * dloss, dx[target]);",
        "narrow((p - each) * dloss, dx[target]);",
        "test_cross_entropy.py::test_leading_shapes[cpu-avx2-(2, 3)]",
    ),
    Mutant(
        "padding keeps its logits", LOSS_H,
        "zero_row(x + rows.V, V_padded - rows.V);", "",
        "test_cross_entropy.py::test_in_place_rows_touch_nothing_else[cpu-avx2-7-fp32]",
    ),
    Mutant(
        "loss of ignored rows kept", LOSS_H,
        "losses[row] = target == rows.ignore_index ? 0 :", "losses[row] = target < -99 ? 0 :",
        "test_cross_entropy.py::test_ignore_index[cpu-avx2-3]",
    ),
    Mutant(
        "the target's logit is read after it was overwritten", LOSS_H,
        "const S p = exp_minus(x_target,", "const S p = exp_minus(Vec<S>::load(x + target),",
        "test_cross_entropy.py::test_gradient_in_place_of_the_logits[cpu-avx2-fp32]",
    ),
    # rows
    Mutant(
        "tail loaded unmasked", ROWS_H,
        "return V::load(p, n);", "return n > 0 ? V::load(p) : V::set(0);",
        "test_layer_norm.py::test_layer_norm[cpu-avx2-C17-N3-fp32-same]",
    ),
    Mutant(
        "tail stored unmasked", ROWS_H,
        "v.store(p, n);", "if (n > 0) v.store(p);",
        "test_cross_entropy.py::test_in_place_rows_touch_nothing_else[cpu-avx2-7-fp32]",
    ),
    Mutant(
        "lanes beyond C in the variance", ROWS_H,
        "return first(n, v, other);", "return n < 0 ? other : v;",
        "test_layer_norm.py::test_mean_far_from_zero[cpu-avx2-1000.0-C17-fp32]",
    ),
    Mutant(
        "blocks of rows overlap", ROWS_H,
        "f(block * blocks.rows, blocks.end(block),", "f(block * blocks.rows, blocks.N,",
        "test_layer_norm.py::test_many_rows_per_program[cpu-avx2]",
    ),
    Mutant(
        "partial sums start from what was there", ROWS_H,
        "memset(partial + block * C, 0, C * sizeof(S));", "",
        "test_layer_norm.py::test_many_rows_per_program[cpu-avx2]",
    ),
    Mutant(
        "the first block's partial sums alone", ROWS_H,
        "i < blocks.count; ++i", "i < 1; ++i",
        "test_layer_norm.py::test_many_rows_per_program[cpu-avx2]",
    ),
    Mutant(
        "every strip of columns stored over the first", ROWS_H,
        "store(sum, out + begin + c, lanes);", "store(sum, out + c, lanes);",
        "test_cpu.py::test_bits_do_not_depend_on_threads[cpu-avx2-layer_norm-fp32]",
    ),
    # vectors and their functions
    Mutant(
        "a coefficient of exp2", MATH_H,
        "2.40226468906e-1f", "2.40228e-1f",
        "test_cpu.py::test_exp_keeps_its_bound[cpu-avx2]",
    ),
    Mutant(
        "exp2 wraps around below its range", MATH_H,
        "exp2_inside(is_double ? x : max(V::set(-127), x))", "exp2_inside(x)",
        "test_cross_entropy.py::test_large_logits[cpu-avx2-10000.0]",
    ),
    Mutant(
        "one lane too many", AVX2_H,
        "_mm256_set1_epi32(int32_t(n))", "_mm256_set1_epi32(int32_t(n) + 1)",
        "test_cross_entropy.py::test_in_place_rows_touch_nothing_else[cpu-avx2-7-fp32]",
    ),
    Mutant(
        "a sum that misses lanes", AVX2_H,
        "x = _mm_add_ps(x, _mm_movehl_ps(x, x));", "",
        "test_layer_norm.py::test_layer_norm[cpu-avx2-C17-N3-fp32-same]",
    ),
    Mutant(
        "a maximum that misses lanes", AVX2_H,
        "x = _mm_max_ps(x, _mm_movehl_ps(x, x));", "",
        "test_cross_entropy.py::test_the_largest_logit_may_be_anywhere[cpu-avx2-fp32]",
    ),
    Mutant(
        "bfloat16 truncated", AVX2_H,
        "_mm256_blendv_epi8(_mm256_add_epi32(u, half), quiet, nan)",
        "_mm256_blendv_epi8(u, quiet, nan)",
        "test_cpu.py::test_every_half_precision_number_is_read_and_rounded[cpu-avx2-bf16]",
    ),
    Mutant(
        "bfloat16 ties away from zero", VEC_H,
        "(u + 0x7fff + (u >> 16 & 1)) >> 16", "(u + 0x8000) >> 16",
        "test_cpu.py::test_every_half_precision_number_is_read_and_rounded[cpu-scalar-bf16]",
    ),
    Mutant(
        "float16 rounds subnormals as normal numbers", VEC_H,
        "rest < 0x38800000", "rest < 0x38000000",
        "test_cpu.py::test_every_half_precision_number_is_read_and_rounded[cpu-scalar-fp16]",
    ),
    # the way to a kernel
    Mutant(
        "stride-0 gradient read as contiguous", OPS_LOSS_CPP,
        "dlosses = as_contiguous(dlosses_);", "dlosses = dlosses_;",
        "test_cross_entropy.py::test_ignore_index[cpu-avx2--1]",
    ),
    Mutant(
        "rows of logits packed", OPS_LOSS_CPP,
        "logits.size(0), V, logits.stride(0),", "logits.size(0), V, V,",
        "test_cross_entropy.py::test_in_place_rows_touch_nothing_else[cpu-avx2-7-fp32]",
    ),
]  # fmt: skip
