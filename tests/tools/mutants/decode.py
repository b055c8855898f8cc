"""Bugs to plant in decode_attention of Triton."""

from . import Mutant

DECODE = "kernels/triton/decode_attention.py"

TESTED = "kernels/test_decode_attention.py::test_decode[triton-B{}-fp32]"
HEAVY = "kernels/test_decode_attention.py::test_one_key_outweighs_all_others[triton]"

DECODE_MUTANTS = [
    # a piece
    Mutant(
        "the key after the last", DECODE,
        "s = tl.where(offs_n < end, s, NEG_INF)", "s = tl.where(offs_n <= end, s, NEG_INF)",
        TESTED.format("1-T17-D16"), quick=True,
    ),
    # their sum
    Mutant(
        "a piece that lowers the maximum", DECODE,
        "m_new = tl.maximum(m, m_i)", "m_new = m_i",
        HEAVY,
    ),
    Mutant(
        "no keys give 0 / 0", DECODE,
        "tl.where(used > 0, acc / l, tl.where(inside, 0.0, float(\"nan\")))", "acc / l",
        "kernels/test_decode_attention.py::test_no_keys_give_zeros_and_nan_stays[triton]",
    ),
]  # fmt: skip
