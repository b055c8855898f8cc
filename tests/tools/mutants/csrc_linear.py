"""Bugs to plant in csrc's kernels for decoding.

Not in the list: threads with overlapping shares, because both write the same values.
"""

from . import Mutant

OPS_LINEAR_CPP = "csrc/ops/linear.cpp"
DECODE_LAYERS_CPP = "csrc/ops/decode_layers.cpp"
LINEAR_H = "csrc/cpu/linear.h"

FEW = "kernels/test_linear_few_rows.py::test_a_few_rows[cpu-{}]"
BLOCKS = (
    "generate/test_decoding.py::"
    "test_all_blocks_as_one_call_have_the_bits_of_the_blocks[cpu-avx2-{}]"
)

LINEAR_MUTANTS = [
    # sums over K
    Mutant(
        "tail of a row loaded unmasked", LINEAR_H,
        "V::load(w + j * step + k, ld - k)", "V::load(w + j * step + k)",
        FEW.format("avx2-whole-bias-M1-N4-K7-fp32"),
    ),
    # x as whole numbers
    Mutant(
        "sums of whole numbers that overflow", LINEAR_H,
        "kBits = 13", "kBits = 14",
        "kernels/test_linear_few_rows.py::test_the_largest_sums_of_whole_numbers_fit[cpu-avx2-1]",
    ),
    Mutant(
        "NaN lost among whole numbers", LINEAR_H,
        " + nothing.sum()", "",
        "kernels/test_linear_few_rows.py::test_nan_and_infinity_stay_in_their_row[cpu-avx2]",
    ),
    # rows of x and of the weight
    Mutant(
        "an odd last row of x", LINEAR_H,
        "    for (; m < p.M; ++m) tile<1, N>(m, n, step);\n", "",
        FEW.format("avx512-whole-bias-M3-N4-K64-fp32"),
    ),
    # the way to the kernel
    Mutant(
        "a transposed weight read as it lies", OPS_LINEAR_CPP,
        "weight = as_contiguous(weight_);", "weight = weight_;",
        "kernels/test_linear_few_rows.py::test_views_are_read_as_they_are[cpu-avx2]",
    ),
]  # fmt: skip

BLOCK_MUTANTS = [
    # weights
    Mutant(
        "the first layer's scales in all", DECODE_LAYERS_CPP,
        "&scales[i * kScalesPerLayer]", "&scales[0]",
        BLOCKS.format("fp32-int8"),
    ),
    # the cache
    Mutant(
        "a token does not see itself", DECODE_LAYERS_CPP,
        "= lengths[b] + 1;", "= lengths[b];",
        BLOCKS.format("fp32-whole"),
    ),
]  # fmt: skip
