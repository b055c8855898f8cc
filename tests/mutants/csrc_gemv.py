"""Bugs to plant in csrc's kernels for decoding.

Not in the list: threads whose shares overlap, since both write the same.
"""

from . import Mutant

GEMV_H = "csrc/cpu/gemv.h"
OPS_GEMV_CPP = "csrc/cpu/ops_gemv.cpp"
OPS_DECODE_CPP = "csrc/cpu/ops_decode.cpp"

FEW = "test_few_rows.py::test_a_few_rows[cpu-{}]"
BLOCKS = "test_generation.py::test_all_blocks_as_one_call_have_the_bits_of_the_blocks[cpu-avx2-{}]"

GEMV_MUTANTS = [
    # sums over K
    Mutant(
        "tail of a row loaded unmasked", GEMV_H,
        "V::load(w + j * step + k, ld - k)", "V::load(w + j * step + k)",
        FEW.format("avx2-whole-bias-M1-N4-K7-fp32"),
    ),
    # x as whole numbers
    Mutant(
        "sums of whole numbers that overflow", GEMV_H,
        "kBits = 13", "kBits = 14",
        "test_few_rows.py::test_the_largest_sums_of_whole_numbers_fit[cpu-avx2-1]",
    ),
    Mutant(
        "NaN lost among whole numbers", GEMV_H,
        " + nothing.sum()", "",
        "test_few_rows.py::test_nan_and_infinity_stay_in_their_row[cpu-avx2]",
    ),
    # rows of x and of the weight
    Mutant(
        "an odd last row of x", GEMV_H,
        "    for (; m < p.M; ++m) tile<1, N>(m, n, step);\n", "",
        FEW.format("avx512-whole-bias-M3-N4-K64-fp32"),
    ),
    # the way to the kernel
    Mutant(
        "a transposed weight read as it lies", OPS_GEMV_CPP,
        "weight = as_contiguous(weight_);", "weight = weight_;",
        "test_few_rows.py::test_views_are_read_as_they_are[cpu-avx2]",
    ),
]  # fmt: skip

BLOCK_MUTANTS = [
    # weights
    Mutant(
        "the first layer's scales in all", OPS_DECODE_CPP,
        "scales[layer * 4 + linear]", "scales[linear]",
        BLOCKS.format("fp32-int8"),
    ),
    # the cache
    Mutant(
        "a token does not see itself", OPS_DECODE_CPP,
        "= lengths[b] + 1;", "= lengths[b];",
        BLOCKS.format("fp32-whole"),
    ),
]  # fmt: skip
