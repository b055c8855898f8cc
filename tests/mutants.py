"""Bugs to plant: each must make a test fail. tests/test_mutants.py plants them in a copy.

A mutant replaces one piece of text, which occurs exactly once in its file, and names the test that
must notice. Quick ones are planted in every run, the others with --full; those of csrc, which must
be compiled, are in mutants_rows.py and mutants_attention.py. Not in the lists, since a test cannot
see them here: what changes nothing (a second mask where one is enough), and what only a GPU does
differently (a barrier, a fused multiply-add).
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killed_by: str
    quick: bool = False


ATTENTION = "kernels/triton/attention.py"
LANG = "kernels/triton/lang.py"
NORM = "kernels/triton/layer_norm.py"
GELU = "kernels/triton/gelu.py"
LOSS = "kernels/triton/cross_entropy.py"
LINEAR = "kernels/linear_cross_entropy.py"
PRODUCT = "kernels/product.py"
AUTOGRAD = "kernels/autograd.py"
DISPATCH = "kernels/dispatch.py"
OPS = "kernels/ops.py"

MUTANTS = [
    # attention: which keys a query sees
    Mutant(
        "causal mask dropped", ATTENTION,
        "s = tl.where(offs_n[None, :] <= offs_m[:, None] + (Tk - Tq), s, NEG_INF)",
        "s = tl.where(offs_n[None, :] < Tk, s, NEG_INF)",
        "test_attention.py::test_no_row_depends_on_a_later_key[triton-100-huge-fp32]", quick=True,
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
        "test_attention.py::test_no_gradient_flows_back_in_time[triton]",
    ),
    Mutant(
        "first query aligned with first key", ATTENTION,
        "first_seen = start_m + 1 + Tk - Tq", "first_seen = start_m + 1",
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
        "test_attention.py::test_no_gradient_flows_back_in_time[triton]",
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
        "test_attention.py::test_scores_of_minus_infinity[triton]",
    ),
    Mutant(
        "natural scale in powers of two", ATTENTION,
        "softmax_scale * LOG2E.value, *_dropout_args(dropout_p),",
        "softmax_scale, *_dropout_args(dropout_p),",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "lse in powers of two", ATTENTION,
        "lse = (m * scale_log2 + tl.log2(l)) * LN2", "lse = m * scale_log2 + tl.log2(l)",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dq not scaled", ATTENTION,
        "store_rows(dq_ptr, dq * scale,", "store_rows(dq_ptr, dq,",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "dk scaled twice", ATTENTION,
        "store_rows(dk_ptr, dk * scale,", "store_rows(dk_ptr, dk * scale * scale,",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "scale_log2 of the backward rounded apart from the forward's", ATTENTION,
        "    scale_log2 = softmax_scale * LOG2E.value\n",
        "    scale_log2 = softmax_scale * LOG2E.value * (1 + 2**-21)\n",
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
        "test_attention.py::test_nan_in_a_query_stays_in_its_row[triton-40]",
    ),
    # attention: memory
    Mutant(
        "tail of the keys loaded unmasked", ATTENTION,
        "DIAGONAL == 1)\n            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)\n"
        "            if DIAGONAL:",
        "False)\n            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)\n"
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
        "test_attention.py::test_row_strides_that_overflow_int32[triton]", quick=True,
    ),
    Mutant(
        "o laid out with heads first", ATTENTION,
        "o_ptr += (b * Tq * H + h) * D\n\n", "o_ptr += (b * H + h) * Tq * D\n\n",
        "test_attention.py::test_short[triton-T17-D16-contiguous-fp32-]",
    ),
    Mutant(
        "k of the wrong head in dk dv", ATTENTION,
        "k_ptr += b * stride_kb + h * stride_kh\n    v_ptr += b * stride_vb + h * stride_vh\n"
        "    dk_ptr",
        "k_ptr += b * stride_kb\n    v_ptr += b * stride_vb + h * stride_vh\n    dk_ptr",
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
        "start_n, BLOCK_N, dropout_threshold)\n                keep_t",
        "start_n + 4, BLOCK_N, dropout_threshold)\n                keep_t",
        "test_dropout.py::test_dropout_mask_is_the_same_in_forward_and_backward[triton]",
    ),
    Mutant(
        "dropped output not scaled up", ATTENTION,
        "acc *= dropout_scale", "acc *= 1.0",
        "test_dropout.py::test_dropout_rate[triton-0.5]",
    ),
    Mutant(
        "dv not scaled up", ATTENTION,
        "dropped_t = tl.where(keep_t, p_t * dropout_scale, 0.0)",
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
        "seed not drawn", OPS,
        "torch.randint(2**63 - 1, (1,), device=x.device)",
        "torch.zeros(1, dtype=torch.int64, device=x.device)",
        "test_dropout.py::test_dropout_masks_differ_by_seed_and_position[triton]",
    ),
    # layer_norm
    Mutant(
        "lanes beyond C in the variance", NORM,
        "centred = tl.where((offs_c < C)[None, :], x - mean[:, None], 0.0)",
        "centred = x - mean[:, None]",
        "test_layer_norm.py::test_mean_far_from_zero[triton-1000.0-C17-fp32]", quick=True,
    ),
    Mutant(
        "variance as E[x^2] - mean^2", NORM,
        "tl.sum(centred * centred, axis=1) / C + eps",
        "tl.sum(x * x, axis=1) / C - mean * mean + eps",
        "test_layer_norm.py::test_mean_far_from_zero[triton-1000.0-C768-fp32]",
    ),
    Mutant(
        "variance over C - 1", NORM,
        "tl.sum(centred * centred, axis=1) / C + eps",
        "tl.sum(centred * centred, axis=1) / (C - 1) + eps",
        "test_layer_norm.py::test_ranks[triton-shape1-fp32]",
    ),
    Mutant(
        "eps outside the root", NORM,
        "1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)",
        "1.0 / (tl.sqrt(tl.sum(centred * centred, axis=1) / C) + eps)",
        "test_layer_norm.py::test_eps[triton]",
    ),
    Mutant(
        "dx keeps its component along xhat", NORM,
        "(wdy - mean_wdy[:, None] - xhat * mean_wdy_xhat[:, None])", "(wdy - mean_wdy[:, None])",
        "test_layer_norm.py::test_ranks[triton-shape1-fp32]",
    ),
    Mutant(
        "dw stored as db", NORM,
        "tl.store(db_partial_ptr + partial, tl.sum(db,",
        "tl.store(db_partial_ptr + partial, tl.sum(dw,",
        "test_layer_norm.py::test_ranks[triton-shape1-fp32]",
    ),
    Mutant(
        "partial sums of every program in one row", NORM,
        "partial = tl.program_id(0) * C + offs_c", "partial = offs_c",
        "test_layer_norm.py::test_many_rows_per_program[triton]",
    ),
    Mutant(
        "programs walk the rows with too small a stride", NORM,
        "N, tl.num_programs(0) * ROWS)", "N, (tl.num_programs(0) - 1) * ROWS)",
        "test_layer_norm.py::test_many_rows_per_program[triton]",
    ),
    Mutant(
        "gradient of the sum left out", NORM,
        "ADD=ds is not None", "ADD=False",
        "test_layer_norm.py::test_either_output_alone[triton-both]",
    ),
    Mutant(
        "residual takes the gradient of the sum alone", AUTOGRAD,
        "return dx, dx, dweight, dbias, None, None", "return dx, ds, dweight, dbias, None, None",
        "test_layer_norm.py::test_either_output_alone[triton-both]",
    ),
    Mutant(
        "norm of a sum that is not the stored one", NORM,
        "x = s.to(tl.float32)", "x = x + residual.to(tl.float32)",
        "test_layer_norm.py::test_the_norm_sees_the_sum_as_it_is_stored[triton]",
    ),
    # gelu
    Mutant(
        "erf for tanh", LANG,
        "return x / (1.0 + _gelu_exp(x))",
        "return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))",
        "test_gelu.py::test_the_tanh_form[triton]",
    ),
    Mutant(
        "1 - g cancels", LANG,
        "(e * g) * g * du", "(1.0 - g) * g * du",
        "test_gelu.py::test_gradient_on_the_right_keeps_its_accuracy[triton]",
    ),
    Mutant(
        "gradient overflows on the left", LANG,
        "grad = tl.where(x < -10.0, 0.0, grad)", "grad = tl.where(x < -100.0, 0.0, grad)",
        "test_gelu.py::test_extremes[triton-fp32]",
    ),
    Mutant(
        "gradient is 1 too early", LANG,
        "tl.where(x > 10.0, 1.0, grad)", "tl.where(x > 2.0, 1.0, grad)",
        "test_gelu.py::test_gelu[triton-1.0-255-fp32]",
    ),
    Mutant(
        "tail of the output stored", GELU,
        "gelu(x).to(y_ptr.dtype.element_ty), mask=offs < n)",
        "gelu(x).to(y_ptr.dtype.element_ty), mask=offs >= 0)",
        "test_gelu.py::test_gelu[triton-1.0-17-fp32]",
    ),
    Mutant(
        "dbias skips tiles of rows", GELU,
        "N, tl.num_programs(0) * ROWS)", "N, (tl.num_programs(0) + 1) * ROWS)",
        "test_gelu.py::test_bias_gelu[triton-N33-C17-fp32-same]",
    ),
    # cross_entropy
    Mutant(
        "one-hot left out", LOSS,
        "tl.where(offs == target, p - 1.0, p)", "p",
        "test_cross_entropy.py::test_leading_shapes[triton-(2, 3)]", quick=True,
    ),
    Mutant(
        "gradient of ignored rows kept", LOSS,
        "tl.where(counts & (offs < V), dx, 0.0)", "tl.where(offs < V, dx, 0.0)",
        "test_cross_entropy.py::test_ignored_rows_add_nothing[triton]",
    ),
    Mutant(
        "loss of ignored rows kept", LOSS,
        "tl.where(counts, tl.log2(l) * LN2 + (m - x_target), 0.0)",
        "tl.log2(l) * LN2 + (m - x_target)",
        "test_cross_entropy.py::test_ignore_index[triton--1]",
    ),
    Mutant(
        "target loaded where it is ignored", LOSS,
        "mask=counts, other=0.0)", "mask=target == target, other=0.0)",
        "test_cross_entropy.py::test_leading_shapes[triton-(2, 3)]",
    ),
    Mutant(
        "padding counted in the softmax", LOSS,
        "logits.stride(0), V, logits.shape[1], ignore_index",
        "logits.stride(0), logits.shape[1], logits.shape[1], ignore_index",
        "test_cross_entropy.py::test_leading_shapes[triton-(2, 3)]",
    ),
    Mutant(
        "sum not rescaled", LOSS,
        "l = l * tl.exp2((m - shift) * LOG2E) +", "l = l +",
        "test_cross_entropy.py::test_cross_entropy[triton-20.0-V9001-N3-fp32-none]",
    ),
    Mutant(
        "log-sum-exp as one number", LOSS,
        "tl.log2(l) * LN2 + (m - x_target)", "(tl.log2(l) * LN2 + m) - x_target",
        "test_cross_entropy.py::test_large_logits[triton-10000.0]",
    ),
    Mutant(
        "a block of -inf", LOSS,
        "shift = tl.where(m_new == NEG_INF, 0.0, m_new)", "shift = m_new",
        "test_cross_entropy.py::test_minus_infinity_is_a_probability_of_zero[triton]",
    ),
    Mutant(
        "rows in 32 bits", LOSS,
        "row = tl.program_id(0).to(tl.int64)\n    logits_ptr",
        "row = tl.program_id(0)\n    logits_ptr",
        "test_cross_entropy.py::test_rows_that_overflow_int32[triton]",
    ),
    Mutant(
        "gradient in place, unknown to autograd", AUTOGRAD,
        "torch.autograd.graph.increment_version(logits)", "pass",
        "test_cross_entropy.py::test_gradient_in_place_of_the_logits[triton-fp32]",
    ),
    Mutant(
        "mean over ignored targets too", OPS,
        'return total if reduction == "sum" else total / (targets != ignore_index).sum()',
        "return total / targets.numel()",
        "test_cross_entropy.py::test_ignore_index[triton--1]",
    ),
    Mutant(
        "chunks overlap", LINEAR,
        "range(0, N, rows)", "range(0, N, max(rows - 1, 1))",
        "test_cross_entropy.py::test_linear_cross_entropy[triton-V65-N33-C16-fp32-same-none]",
    ),
    Mutant(
        "last chunk alone in dweight", LINEAR,
        "beta=0 if first else 1", "beta=0",
        "test_cross_entropy.py::test_linear_cross_entropy[triton-V65-N200-C16-fp32-same-none]",
    ),
    Mutant(
        "gradients taken under no_grad", OPS,
        "(torch.is_grad_enabled() and t.requires_grad for", "(t.requires_grad for",
        "test_cross_entropy.py::test_only_what_is_needed_is_computed[triton-x-no_grad]",
    ),
    Mutant(
        "gradient in place of expanded logits", AUTOGRAD,
        " and logits.stride(0) >= logits.shape[1]", "",
        "test_cross_entropy.py::test_gradient_in_place_of_expanded_logits[triton]",
    ),
    Mutant(
        "saved gradient scaled in place", AUTOGRAD,
        "dx = dx * dtotal if", "dx = dx.mul_(dtotal) if",
        "test_cross_entropy.py::test_every_subset_of_gradients_twice[triton]",
    ),
    # the products of the model and of the head
    Mutant(
        "sums of 16 bits", PRODUCT,
        "t.to(dtype).float()", "t.to(dtype)",
        "test_linear.py::test_wide_products_are_float32[widened]",
    ),
    Mutant(
        "operands not rounded", PRODUCT,
        "t.to(dtype).float()", "t.float()",
        "test_linear.py::test_operands_are_rounded_as_autocast_rounds_them[widened]",
    ),
    Mutant(
        "result not rounded", PRODUCT,
        "F.linear(*operands).to(dtype)", "F.linear(*operands)",
        "test_linear.py::test_linear[widened-bf16]",
    ),
    Mutant(
        "autocast takes the wide product for one of its own", PRODUCT,
        "enabled=False", "enabled=True",
        "test_linear.py::test_wide_products_are_float32[widened]",
    ),
    Mutant(
        "oneDNN for every dtype", PRODUCT,
        "        and x.dtype == torch.float32\n", "",
        "test_linear.py::test_what_onednn_is_not_asked_for[x-bfloat16]",
    ),
    Mutant(
        "oneDNN for a strided weight", PRODUCT,
        "        and weight.is_contiguous()\n", "",
        "test_linear.py::test_what_onednn_is_not_asked_for[weight-strided]",
    ),
    Mutant(
        "oneDNN though it is turned off", PRODUCT,
        "        and torch.backends.mkldnn.enabled\n", "",
        "test_linear.py::test_logits[mm]",
    ),
    Mutant(
        "two chunks of logits at a time", LINEAR,
        "chunk = None", "pass",
        "test_cross_entropy.py::test_one_chunk_of_logits_at_a_time[triton]",
    ),
    # the way to a kernel
    Mutant(
        "fallback without a word", DISPATCH,
        '_say_once(op, "; ".join(reasons))', "pass",
        "test_attention.py::test_other_head_sizes_fall_back_with_a_reason[8]",
    ),
    Mutant(
        "forced backend falls back", DISPATCH,
        'raise BackendUnavailable(f"{_forced} cannot serve {op}: {reason}")', 'return "reference"',
        "test_layer_norm.py::test_longer_rows_fall_back_with_a_reason",
    ),
    Mutant(
        "gradients of the first input alone", AUTOGRAD,
        "x.requires_grad for x in args", "x.requires_grad for x in args[:1]",
        "test_dispatch.py::test_autograd_is_left_out_where_nothing_needs_a_gradient"
        "[triton-layer_norm]",
    ),
    Mutant(
        "forward mode lost", AUTOGRAD,
        "needed or forward_ad._current_level >= 0", "needed",
        "test_dispatch.py::test_forward_mode_is_refused[triton]",
    ),
    Mutant(
        "second derivative not refused", AUTOGRAD,
        "    @once_differentiable\n    def backward(ctx, do):\n        *saved, seed",
        "    def backward(ctx, do):\n        *saved, seed",
        "test_attention.py::test_second_derivatives_are_refused[triton]",
    ),
]  # fmt: skip
