"""Bugs to plant in decode_attention of Triton."""

from . import Mutant

DECODE = "kernels/triton/decode_attention.py"

TESTED = "test_decode_attention.py::test_decode[triton-B{}-fp32]"
HEAVY = "test_decode_attention.py::test_one_key_outweighs_all_others[triton]"
PIECES = "test_decode_attention.py::test_last_row_of_the_full_forward[triton]"

DECODE_MUTANTS = [
    # a piece
    Mutant(
        "the key after the last", DECODE,
        "s = tl.where(offs_n < end, s, NEG_INF)", "s = tl.where(offs_n <= end, s, NEG_INF)",
        TESTED.format("1-T17-D16"), quick=True,
    ),
    Mutant(
        "rows beyond a length read", DECODE,
        "end = tl.minimum((split + 1) * SPLIT, length)", "end = (split + 1) * SPLIT",
        TESTED.format("1-T17-D16"),
    ),
    Mutant(
        "pieces without an end", DECODE,
        "end = tl.minimum((split + 1) * SPLIT, length)", "end = length",
        PIECES,
    ),
    Mutant(
        "a piece that begins one key late", DECODE,
        "for start in range(split * SPLIT, end, BLOCK_N):",
        "for start in range(split * (SPLIT + 1), end, BLOCK_N):",
        PIECES,
    ),
    Mutant(
        "a last piece of one key left out", DECODE,
        "if split * SPLIT >= length:", "if split * SPLIT >= length - 1:",
        TESTED.format("1-T257-D16"),
    ),
    Mutant(
        "l of a step not rescaled", DECODE,
        "l = l * alpha + tl.sum(p, axis=0)", "l = l + tl.sum(p, axis=0)",
        TESTED.format("1-T255-D16"),
    ),
    Mutant(
        "acc of a step not rescaled", DECODE,
        "acc = acc * alpha + tl.sum(p[:, None]", "acc = acc + tl.sum(p[:, None]",
        TESTED.format("1-T255-D16"),
    ),
    Mutant(
        "a step that lowers the maximum", DECODE,
        "m_new = tl.maximum(m, tl.max(s, axis=0))", "m_new = tl.max(s, axis=0)",
        HEAVY,
    ),
    Mutant(
        "a natural scale in powers of two", DECODE,
        "scale_log2 = softmax_scale * LOG2E.value", "scale_log2 = softmax_scale",
        TESTED.format("1-T17-D16"),
    ),
    Mutant(
        "padding of the head read", DECODE,
        "head_of(q, b, h) + offs_d, mask=offs_d < D, other=0.0)", "head_of(q, b, h) + offs_d)",
        TESTED.format("1-T2-D7"),
    ),
    Mutant(
        "padding of the head stored", DECODE,
        "tl.store(acc_ptr + at * D + offs_d, acc, mask=offs_d < D)",
        "tl.store(acc_ptr + at * D + offs_d, acc)",
        TESTED.format("1-T2-D7"),
    ),
    Mutant(
        "the first sequence's length", DECODE,
        "length = tl.load(lengths_ptr + b)", "length = tl.load(lengths_ptr)",
        TESTED.format("3-T17-D16"),
    ),
    # their sum
    Mutant(
        "pieces added as they are", DECODE,
        "acc = acc * alpha + acc_i * beta", "acc = acc + acc_i",
        PIECES,
    ),
    Mutant(
        "a piece that lowers the maximum", DECODE,
        "m_new = tl.maximum(m, m_i)", "m_new = m_i",
        HEAVY,
    ),
    Mutant(
        "the last piece left out", DECODE,
        "used = tl.cdiv(tl.where(inside, length, 0), SPLIT)",
        "used = tl.where(inside, length, 0) // SPLIT",
        TESTED.format("1-T257-D16"),
    ),
    Mutant(
        "pieces beyond a length", DECODE,
        "used = tl.cdiv(tl.where(inside, length, 0), SPLIT)", "used = splits",
        PIECES,
    ),
    Mutant(
        "no keys give 0 / 0", DECODE,
        "tl.where(used > 0, acc / l, tl.where(inside, 0.0, float(\"nan\")))", "acc / l",
        "test_decode_attention.py::test_no_keys_give_zeros_and_nan_stays[triton]",
    ),
]  # fmt: skip
