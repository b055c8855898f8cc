"""Bugs to plant in the Triton kernels of attention."""

from . import Mutant

ATTENTION = "kernels/triton/attention.py"
LANG = "kernels/triton/lang.py"

ATTENTION_MUTANTS = [
    # attention: which keys a query sees
    Mutant(
        "causal mask dropped", ATTENTION,
        "s = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), s, NEG_INF)",
        "s = tl.where(offs_n[None, :] < Tk, s, NEG_INF)",
        "kernels/test_attention_hazards.py::test_no_row_depends_on_a_later_key[triton-100-huge-fp32]",
        quick=True,
    ),
    Mutant(
        "first query aligned with first key", ATTENTION,
        "first_seen = start_m + 1 + scores.Tk - scores.Tq", "first_seen = start_m + 1",
        "kernels/test_attention.py::test_last_query_meets_last_key[triton-65-200-D16-fp32-]",
    ),
    Mutant(
        "dk dv leave the diagonal unmasked", ATTENTION,
        "tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M)",
        "tl.cdiv(tl.maximum(start_n - (Tk - Tq), 0), BLOCK_M)",
        "kernels/test_attention_hazards.py::test_no_gradient_flows_back_in_time[triton]",
    ),
    # attention: the online softmax and its scales
    Mutant(
        "acc not rescaled", ATTENTION,
        "acc * alpha[:, None], input_precision", "acc, input_precision",
        "kernels/test_attention.py::test_short[triton-T65-D64-contiguous-fp32-]", quick=True,
    ),
    Mutant(
        "dq written over the saved o", ATTENTION,
        "    _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, softmax_scale, dropout_p, seed, None)\n"
        "    return",
        "    _attention_bwd(do, q, k, v, o, lse, o, dk, dv, softmax_scale, dropout_p, seed, None)\n"
        "    dq.copy_(o)\n    return",
        "kernels/test_attention.py::test_backward_twice_and_stride_0_gradients[triton]",
    ),
    Mutant(
        "NaN swallowed", ATTENTION,
        "store_rows(o_ptr, acc / l[:, None],",
        "store_rows(o_ptr, tl.where(l[:, None] > 0, acc / l[:, None], 0.0),",
        "kernels/test_attention_hazards.py::test_nan_in_a_query_stays_in_its_row[triton-40]",
    ),
    # attention: memory
    Mutant(
        "padding of the head stored", LANG,
        "    mask = (offs_row < n_rows)[:, None] & (offs_d < D)[None, :]\n",
        "    mask = (offs_row < n_rows)[:, None] & (offs_d < BLOCK_D)[None, :]\n",
        "kernels/test_attention.py::test_short[triton-T17-D80-packed-fp32-]",
    ),
    Mutant(
        "row offsets in 32 bits", LANG,
        "offs_row[:, None].to(tl.int64) * stride + offs_d[None, :]\n    if MASKED:",
        "offs_row[:, None] * stride + offs_d[None, :]\n    if MASKED:",
        "kernels/test_attention_hazards.py::test_row_strides_that_overflow_int32[triton]",
        quick=True,
    ),
    # attention: dropout
    Mutant(
        "dropout mask of dk dv shifted", ATTENTION,
        "start_n, BLOCK_N, scores.dropout_threshold)\n                keep_t",
        "start_n + 4, BLOCK_N, scores.dropout_threshold)\n                keep_t",
        "kernels/test_dropout.py::test_dropout_mask_is_the_same_in_forward_and_backward[triton]",
    ),
]  # fmt: skip
