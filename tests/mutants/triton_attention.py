"""Bugs to plant in the Triton kernels of attention."""

from . import Mutant

ATTENTION = "kernels/triton/attention.py"
LANG = "kernels/triton/lang.py"
CHECKS = "kernels/checks.py"

ATTENTION_MUTANTS = [
    # attention: which keys a query sees
    Mutant(
        "causal mask dropped", ATTENTION,
        "s = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), s, NEG_INF)",
        "s = tl.where(offs_n[None, :] < Tk, s, NEG_INF)",
        "test_attention_hazards.py::test_no_row_depends_on_a_later_key[triton-100-huge-fp32]",
        quick=True,
    ),
    Mutant(
        "a query does not see its own key", ATTENTION,
        "s = tl.where(offs_n[None, :] <= offs_m", "s = tl.where(offs_n[None, :] < offs_m",
        "test_attention.py::test_last_query_meets_last_key[triton-17-64-D16-fp32-]",
    ),
    Mutant(
        "dq sees one key too many", ATTENTION,
        "p = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), p, 0.0)",
        "p = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq) + 1, p, 0.0)",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk dv see one query too many", ATTENTION,
        "<= offs_m[None, :] + (Tk - Tq), p_t, 0.0)",
        "<= offs_m[None, :] + (Tk - Tq) + 1, p_t, 0.0)",
        "test_attention_hazards.py::test_no_gradient_flows_back_in_time[triton]",
    ),
    Mutant(
        "first query aligned with first key", ATTENTION,
        "first_seen = start_m + 1 + scores.Tk - scores.Tq", "first_seen = start_m + 1",
        "test_attention.py::test_last_query_meets_last_key[triton-65-200-D16-fp32-]",
    ),
    Mutant(
        "dk dv start at the first query's own key", ATTENTION,
        "start = tl.maximum(start_n - (Tk - Tq), 0) // BLOCK_M * BLOCK_M",
        "start = start_n // BLOCK_M * BLOCK_M",
        "test_attention.py::test_last_query_meets_last_key[triton-65-200-D16-fp32-]",
    ),
    Mutant(
        "dk dv leave the diagonal unmasked", ATTENTION,
        "tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - (Tk - Tq), 0), BLOCK_M)",
        "tl.cdiv(tl.maximum(start_n - (Tk - Tq), 0), BLOCK_M)",
        "test_attention_hazards.py::test_no_gradient_flows_back_in_time[triton]",
    ),
    # attention: the online softmax and its scales
    Mutant(
        "acc not rescaled", ATTENTION,
        "acc * alpha[:, None], input_precision", "acc, input_precision",
        "test_attention.py::test_short[triton-T65-D64-contiguous-fp32-]", quick=True,
    ),
    Mutant(
        "l not rescaled", ATTENTION,
        "l = l * alpha + tl.sum(p, axis=1)", "l = l + tl.sum(p, axis=1)",
        "test_attention.py::test_short[triton-T65-D64-contiguous-fp32-]",
    ),
    Mutant(
        "a maximum that starts at -inf", ATTENTION,
        "m = tl.full((BLOCK_M,), LOWEST, tl.float32)",
        "m = tl.full((BLOCK_M,), NEG_INF, tl.float32)",
        "test_attention_hazards.py::test_scores_of_minus_infinity[triton]",
    ),
    Mutant(
        "natural scale in powers of two", ATTENTION,
        "scale_log2=softmax_scale * LOG2E.value,", "scale_log2=softmax_scale,",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "lse in powers of two", ATTENTION,
        "lse = (m * scale_log2 + tl.log2(l)) * LN2", "lse = m * scale_log2 + tl.log2(l)",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dq not scaled", ATTENTION,
        "head_of(dq, b, h), dq_tile * scores.scale,", "head_of(dq, b, h), dq_tile,",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk scaled twice", ATTENTION,
        "dk_tile *= scores.scale", "dk_tile *= scores.scale * scores.scale",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "scale_log2 of the backward rounded apart from the forward's", ATTENTION,
        "tl.exp2(s * scores.scale_log2 - lse_log2[:, None])",
        "tl.exp2(s * (scores.scale_log2 * (1 + 2**-21)) - lse_log2[:, None])",
        "test_attention.py::test_softmax_scale[triton-1.0]",
    ),
    Mutant(
        "delta left out of dq", ATTENTION,
        "ds = p * (dp - delta[:, None])", "ds = p * dp",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "delta written over lse", ATTENTION,
        "delta = torch.empty_like(lse)", "delta = lse",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dq written over the saved o", ATTENTION,
        "    _attention_bwd(do, q, k, v, o, lse, dq, dk, dv, softmax_scale, dropout_p, seed)\n"
        "    return",
        "    _attention_bwd(do, q, k, v, o, lse, o, dk, dv, softmax_scale, dropout_p, seed)\n"
        "    dq.copy_(o)\n    return",
        "test_attention.py::test_backward_twice_and_stride_0_gradients[triton]",
    ),
    Mutant(
        "NaN swallowed", ATTENTION,
        "store_rows(o_ptr, acc / l[:, None],",
        "store_rows(o_ptr, tl.where(l[:, None] > 0, acc / l[:, None], 0.0),",
        "test_attention_hazards.py::test_nan_in_a_query_stays_in_its_row[triton-40]",
    ),
    # attention: memory
    Mutant(
        "tail of the keys loaded unmasked", ATTENTION,
        "D, BLOCK_D, DIAGONAL == 1)\n"
        "            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)\n"
        "            if DIAGONAL:",
        "D, BLOCK_D, False)\n"
        "            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)\n"
        "            if DIAGONAL:",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "rows past the end stored", LANG,
        "    mask = (offs_row < n_rows)[:, None] & (offs_d < D)[None, :]\n",
        "    mask = (offs_row >= 0)[:, None] & (offs_d < D)[None, :]\n",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "padding of the head stored", LANG,
        "    mask = (offs_row < n_rows)[:, None] & (offs_d < D)[None, :]\n",
        "    mask = (offs_row < n_rows)[:, None] & (offs_d < BLOCK_D)[None, :]\n",
        "test_attention.py::test_short[triton-T17-D80-packed-fp32-]",
    ),
    Mutant(
        "row offsets in 32 bits", LANG,
        "offs_row[:, None].to(tl.int64) * stride + offs_d[None, :]\n    if MASKED:",
        "offs_row[:, None] * stride + offs_d[None, :]\n    if MASKED:",
        "test_attention_hazards.py::test_row_strides_that_overflow_int32[triton]", quick=True,
    ),
    Mutant(
        "o laid out with heads first", ATTENTION,
        "head_of(q, b, h), head_of(k, b, h), head_of(v, b, h)\n    o_ptr += (b * Tq * H + h) * D",
        "head_of(q, b, h), head_of(k, b, h), head_of(v, b, h)\n    o_ptr += (b * H + h) * Tq * D",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "k of the wrong head in dk dv", ATTENTION,
        "head_of(k, b, h), head_of(v, b, h)\n    lse_ptr",
        "head_of(k, b, 0), head_of(v, b, h)\n    lse_ptr",
        "test_attention.py::test_packed[triton-2-17-3-D16-fp32-]",
    ),
    Mutant(
        "stride-0 gradient read as contiguous", ATTENTION,
        "return x if x.stride(-1) == 1 else x.contiguous()", "return x",
        "test_attention.py::test_backward_twice_and_stride_0_gradients[triton]",
    ),
    # attention: dropout
    Mutant(
        "dropout mask of dk dv shifted", ATTENTION,
        "start_n, BLOCK_N, scores.dropout_threshold)\n                keep_t",
        "start_n + 4, BLOCK_N, scores.dropout_threshold)\n                keep_t",
        "test_dropout.py::test_dropout_mask_is_the_same_in_forward_and_backward[triton]",
    ),
    Mutant(
        "dropped output not scaled up", ATTENTION,
        "acc *= scores.dropout_scale", "acc *= 1.0",
        "test_dropout.py::test_dropout_rate[triton-0.5]",
    ),
    Mutant(
        "dv not scaled up", ATTENTION,
        "dropped_t = tl.where(keep_t, p_t * scores.dropout_scale, 0.0)",
        "dropped_t = tl.where(keep_t, p_t, 0.0)",
        "test_dropout.py::test_dropout_mask_is_the_same_in_forward_and_backward[triton]",
    ),
    Mutant(
        "one dropout mask for all heads", LANG,
        "zero + bh, zero, 7)", "zero, zero, 7)",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-drop]",
    ),
    Mutant(
        "upper half of the seed ignored", LANG,
        "tl.philox(seed, column", "tl.philox(seed & 0xFFFFFFFF, column",
        "test_dropout.py::test_dropout_masks_differ_by_seed_and_position[triton]",
    ),
    Mutant(
        "seed not drawn", CHECKS,
        "torch.randint(2**63 - 1, (1,), device=x.device)",
        "torch.zeros(1, dtype=torch.int64, device=x.device)",
        "test_dropout.py::test_dropout_masks_differ_by_seed_and_position[triton]",
    ),
]  # fmt: skip
