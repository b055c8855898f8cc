"""Bugs to plant in csrc's kernels for decoding.

Not in the list: threads whose shares overlap, since both write the same.
"""

from . import Mutant

LINEAR_H = "csrc/cpu/linear.h"
VEC_H = "csrc/cpu/vec.h"
AVX2_H = "csrc/cpu/vec_avx2.h"
OPS_LINEAR_CPP = "csrc/ops/linear.cpp"
DECODE_LAYERS_CPP = "csrc/ops/decode_layers.cpp"

FEW = "test_few_rows.py::test_a_few_rows[cpu-{}]"
BLOCKS = "test_generation.py::test_all_blocks_as_one_call_have_the_bits_of_the_blocks[cpu-avx2-{}]"

LINEAR_MUTANTS = [
    # sums over K
    Mutant(
        "every second vector of k", LINEAR_H,
        "sum[i][j] = chains[i][j][0] + chains[i][j][1];", "sum[i][j] = chains[i][j][0];",
        FEW.format("avx2-whole-bias-M1-N4-K64-fp32"),
    ),
    Mutant(
        "what is left of a row dropped", LINEAR_H,
        "k < ld; k += V::W, chain ^= 1", "k + V::W <= ld; k += V::W, chain ^= 1",
        FEW.format("avx2-whole-bias-M1-N4-K7-fp32"),
    ),
    Mutant(
        "tail of a row loaded unmasked", LINEAR_H,
        "V::load(w + j * step + k, ld - k)", "V::load(w + j * step + k)",
        FEW.format("avx2-whole-bias-M1-N4-K7-fp32"),
    ),
    Mutant(
        "tail of x loaded unmasked", LINEAR_H,
        "V::load(from + k, p.K - k).store(", "V::load(from + k).store(",
        FEW.format("avx2-whole-bias-M1-N4-K7-fp32"),
    ),
    Mutant(
        "sums rounded to the model's dtype", LINEAR_H,
        "            to = fma(V::load(x_m + i * padded + at), w_k, to);\n",
        "            T rounded[V::W];\n"
        "            fma(V::load(x_m + i * padded + at), w_k, to).store(rounded);\n"
        "            to = V::load(rounded);\n",
        "test_few_rows.py::test_bf16_is_summed_in_float32[cpu-avx2]",
    ),
    # int8
    Mutant(
        "rows as long as x's features", LINEAR_H,
        "F::kPacked ? padded : p.K,", "p.K,",
        FEW.format("avx2-int8-bias-M1-N9-K100-fp32"),
    ),
    Mutant(
        "one scale for all rows", LINEAR_H,
        "sum *= S(p.scale[n]);", "sum *= S(p.scale[0]);",
        FEW.format("avx2-int8-bias-M1-N4-K64-fp32"),
    ),
    Mutant(
        "a bias that is scaled", LINEAR_H,
        "    if (p.scale) sum *= S(p.scale[n]);\n    if (bias) sum += S(widen(bias[n]));\n",
        "    if (bias) sum += S(widen(bias[n]));\n    if (p.scale) sum *= S(p.scale[n]);\n",
        FEW.format("avx2-int8-bias-M1-N4-K64-fp32"),
    ),
    Mutant(
        "bytes without their signs", AVX2_H,
        "_mm256_set1_epi16(int16_t(0xff00))", "_mm256_set1_epi16(0x7f00)",
        FEW.format("avx2-int8-alone-M1-N4-K64-fp32"),
    ),
    Mutant(
        "low bytes left in their words", AVX2_H,
        "_mm256_and_si256(w, _mm256_set1_epi16(int16_t(0xff00)))", "w",
        FEW.format("avx2-int8-alone-M1-N4-K64-fp32"),
    ),
    Mutant(
        "half a block of 64", AVX2_H,
        "for (int i = 0; i < 4; ++i) {", "for (int i = 0; i < 2; ++i) {",
        FEW.format("avx2-int8-alone-M1-N4-K64-fp32"),
    ),
    Mutant(
        "bytes in the order of their numbers", VEC_H,
        "block[i % 32 * 2 + i / 32]", "block[i]",
        FEW.format("scalar-int8-alone-M1-N4-K64-fp32"),
    ),
    Mutant(
        "a last block that is not whole", LINEAR_H,
        "blocks = ld / kBlock;", "blocks = p.K / kBlock;",
        FEW.format("avx2-int8-bias-M1-N4-K100-fp32"),
    ),
    # x as whole numbers
    Mutant(
        "x beyond its end", LINEAR_H,
        "V::load(from + k, n - k)", "V::load(from + k)",
        FEW.format("avx2-int8-bias-M1-N4-K7-fp32"),
    ),
    Mutant(
        "sums of whole numbers that overflow", LINEAR_H,
        "kBits = 13", "kBits = 14",
        "test_few_rows.py::test_the_largest_sums_of_whole_numbers_fit[cpu-avx2-1]",
    ),
    Mutant(
        "the largest of a block's last numbers", LINEAR_H,
        "largest = max(largest, max(v, V::set(0) - v));", "largest = max(v, V::set(0) - v);",
        "test_few_rows.py::test_one_number_far_larger_than_the_others[cpu-avx2-0]",
    ),
    Mutant(
        "the largest of a block's positive numbers", LINEAR_H,
        "max(v, V::set(0) - v)", "v",
        "test_few_rows.py::test_the_largest_sums_of_whole_numbers_fit[cpu-avx2--1]",
    ),
    Mutant(
        "one unit for all blocks", LINEAR_H,
        "const int of_unit = (exponent > kLeast ? exponent : kLeast) - kBits;",
        "const int of_unit = 3 - kBits;",
        "test_few_rows.py::test_x_of_any_size_keeps_its_digits_in_int8[cpu-avx2--40-fp32]",
    ),
    Mutant(
        "units beyond the range of float32", LINEAR_H,
        "sizeof(S) == 4 ? -112 : -1000", "-1000",
        "test_few_rows.py::test_zeros_and_subnormals_have_a_unit_too[cpu-avx2]",
    ),
    Mutant(
        "NaN lost among whole numbers", LINEAR_H,
        " + nothing.sum()", "",
        "test_few_rows.py::test_nan_and_infinity_stay_in_their_row[cpu-avx2]",
    ),
    Mutant(
        "what is rounded off lost", LINEAR_H,
        "rest = (rest - (shifted - kRound)) * kFiner;", "rest = 0;",
        FEW.format("avx2-int8-bias-M1-N4-K64-fp32"),
    ),
    Mutant(
        "parts in the same unit", LINEAR_H,
        ", unit /= X::kFiner", "",
        FEW.format("avx2-int8-bias-M1-N4-K64-fp32"),
    ),
    Mutant(
        "the first row's whole numbers in all", LINEAR_H,
        "x_m[i * blocks + block]", "x_m[block]",
        FEW.format("avx512-int8-bias-M2-N4-K64-fp32"),
    ),
    # rows of x and of the weight
    Mutant(
        "bias left out", LINEAR_H,
        "if (bias) sum += S(widen(bias[n]));", "",
        FEW.format("avx2-whole-bias-M1-N4-K7-fp32"),
    ),
    Mutant(
        "y transposed", LINEAR_H,
        "y[m * p.N + n]", "y[n * p.M + m]",
        FEW.format("avx2-whole-bias-M3-N9-K7-fp32"),
    ),
    Mutant(
        "streams one row apart", LINEAR_H,
        "rows<kStreams>(n + i, part);", "rows<kStreams>(n + i, 1);",
        FEW.format("avx2-whole-bias-M1-N9-K7-fp32"),
    ),
    Mutant(
        "rows that are no multiple of the streams", LINEAR_H,
        "for (n += part * kStreams; n < end; ++n) rows<1>(n, 0);", "",
        FEW.format("avx2-whole-bias-M1-N9-K7-fp32"),
    ),
    Mutant(
        "each thread's last row", LINEAR_H,
        "f.share(n, end);", "f.share(n, end - 1);",
        FEW.format("avx2-whole-bias-M1-N9-K7-fp32"),
    ),
    Mutant(
        "a tile's second row is its first", LINEAR_H,
        "fma(V::load(x_m + i * padded + at), w_k, to)", "fma(V::load(x_m + at), w_k, to)",
        FEW.format("avx512-whole-bias-M2-N4-K64-fp32"),
    ),
    Mutant(
        "an odd last row of x", LINEAR_H,
        "    for (; m < p.M; ++m) tile<1, N>(m, n, step);\n", "",
        FEW.format("avx512-whole-bias-M3-N4-K64-fp32"),
    ),
    # the way to the kernel
    Mutant(
        "a transposed weight read as it lies", OPS_LINEAR_CPP,
        "weight = as_contiguous(weight_);", "weight = weight_;",
        "test_few_rows.py::test_views_are_read_as_they_are[cpu-avx2]",
    ),
    Mutant(
        "every second bias read as all", OPS_LINEAR_CPP,
        "bias_ ? as_contiguous(*bias_) : x", "bias_ ? *bias_ : x",
        "test_few_rows.py::test_views_are_read_as_they_are[cpu-avx2]",
    ),
    Mutant(
        "numbers without their scale", OPS_LINEAR_CPP,
        "scale_ ? scale.const_data_ptr<float>() : nullptr", "nullptr",
        FEW.format("avx2-int8-bias-M1-N4-K64-fp32"),
    ),
]  # fmt: skip

BLOCK_MUTANTS = [
    # weights
    Mutant(
        "the first layer's weights in all", DECODE_LAYERS_CPP,
        "&tensors[i * kPerLayer]", "&tensors[0]",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "the first layer's scales in all", DECODE_LAYERS_CPP,
        "&scales[i * kScalesPerLayer]", "&scales[0]",
        BLOCKS.format("fp32-int8"),
    ),
    Mutant(
        "the bias before the GELU added twice", DECODE_LAYERS_CPP,
        "multiply(layer.fc, h, inner, false);", "multiply(layer.fc, h, inner);",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "the first norm twice", DECODE_LAYERS_CPP,
        "add_norm(branch, layer.norm_2);", "add_norm(branch, layer.norm_1);",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "an eps of its own", DECODE_LAYERS_CPP,
        ".eps = eps,\n                               .x", ".eps = 2 * eps,\n.x",
        BLOCKS.format("fp32-whole"),
    ),
    # the sum that runs through the blocks
    Mutant(
        "a sum that does not grow", DECODE_LAYERS_CPP,
        "    std::swap(s, next_s);\n", "",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "a sum without the embedded tokens", DECODE_LAYERS_CPP,
        "memcpy(s.mutable_data_ptr(), x.const_data_ptr(), B * C * x.element_size());",
        "memset(s.mutable_data_ptr(), 0, B * C * x.element_size());",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "the last norm of the embedded tokens", DECODE_LAYERS_CPP,
        "layers == 0 ? norm_tokens(last_norm)", "layers >= 0 ? norm_tokens(last_norm)",
        BLOCKS.format("fp32-whole"),
    ),
    # the cache
    Mutant(
        "a token at the place after its own", DECODE_LAYERS_CPP,
        "(b * T + lengths[b]) * row", "(b * T + lengths[b] + 1) * row",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "every token at the first one's place", DECODE_LAYERS_CPP,
        "(b * T + lengths[b]) * row", "(b * T + lengths[0]) * row",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "one layer's cache for all", DECODE_LAYERS_CPP,
        "kv.mutable_data_ptr()) + layer * B * T * row", "kv.mutable_data_ptr())",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "q and k kept for k and v", DECODE_LAYERS_CPP,
        "from + (3 * b + 1) * C * size, row", "from + 3 * b * C * size, row",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "keys for values", DECODE_LAYERS_CPP,
        ".v = {cache + C * x.element_size(),", ".v = {cache,",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "a token does not see itself", DECODE_LAYERS_CPP,
        "= lengths[b] + 1;", "= lengths[b];",
        BLOCKS.format("fp32-whole"),
    ),
    Mutant(
        "scores scaled as of one head", DECODE_LAYERS_CPP,
        "1 / sqrt(double(D))", "1 / sqrt(double(C))",
        BLOCKS.format("fp32-whole"),
    ),
]  # fmt: skip
