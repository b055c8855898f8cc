"""Bugs to plant in the other Triton kernels, in the products, and on the way to a kernel."""

from . import Mutant

LANG = "kernels/triton/lang.py"
NORM = "kernels/triton/layer_norm.py"
GELU = "kernels/triton/gelu.py"
LOSS = "kernels/triton/cross_entropy.py"
LINEAR = "kernels/linear_cross_entropy.py"
PRODUCT = "kernels/product.py"
AUTOGRAD = "kernels/autograd.py"
DISPATCH = "kernels/dispatch.py"
OPS = "kernels/ops.py"
REFERENCE = "kernels/reference.py"

KERNEL_MUTANTS = [
    # layer_norm
    Mutant(
        "lanes beyond C in the variance", NORM,
        "centred = tl.where((offs_c < C)[None, :], s - first_mean[:, None], 0.0)",
        "centred = s - first_mean[:, None]",
        "test_layer_norm.py::test_mean_far_from_zero[triton-1000.0-C17-fp32]", quick=True,
    ),
    Mutant(
        "variance as E[x^2] - mean^2", NORM,
        "tl.sum(centred * centred, axis=1) / C - rest * rest",
        "tl.sum(s * s, axis=1) / C - mean * mean",
        "test_layer_norm.py::test_mean_far_from_zero[triton-1000.0-C768-fp32]",
    ),
    Mutant(
        "variance over C - 1", NORM,
        "tl.sum(centred * centred, axis=1) / C - rest",
        "tl.sum(centred * centred, axis=1) / (C - 1) - rest",
        "test_layer_norm.py::test_ranks[triton-shape1-fp32]",
    ),
    Mutant(
        "eps outside the root", NORM,
        "1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)",
        "1.0 / (tl.sqrt(tl.where(variance < 0.0, 0.0, variance)) + eps)",
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
        "s = stored.to(tl.float32)", "s = s + r.to(tl.float32)",
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
        "tl.where(counts, loss, 0.0)", "loss",
        "test_cross_entropy.py::test_ignore_index[triton--1]",
    ),
    Mutant(
        "target loaded where it is ignored", LOSS,
        "x_target = tl.load(logits_ptr + target, mask=inside",
        "x_target = tl.load(logits_ptr + target, mask=target == target",
        "test_cross_entropy.py::test_leading_shapes[triton-(2, 3)]",
    ),
    Mutant(
        "target beyond the vocabulary", LOSS,
        "inside = (target >= 0) & (target < V)", "inside = target >= 0",
        "test_changed_ids.py::test_every_pass_meets_targets_outside[triton-0.0]",
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
        "mean over ignored targets too", AUTOGRAD,
        "count = (targets != ignore_index).sum()", "count = (targets != ignore_index + 99).sum()",
        "test_cross_entropy.py::test_ignore_index[triton--1]",
    ),
    Mutant(
        "chunks overlap", LINEAR,
        "range(0, N, rows)", "range(0, N, max(rows - 1, 1))",
        "test_linear_cross_entropy.py::test_linear_cross_entropy[triton-V65-N33-C16-fp32-same-none]",
    ),
    Mutant(
        "last chunk alone in dweight", LINEAR,
        "beta=0 if first else 1", "beta=0",
        "test_linear_cross_entropy.py::test_linear_cross_entropy[triton-V65-N200-C16-fp32-same-none]",
    ),
    Mutant(
        "gradients taken under no_grad", OPS,
        "(torch.is_grad_enabled() and t.requires_grad for", "(t.requires_grad for",
        "test_linear_cross_entropy.py::test_only_what_is_needed_is_computed[triton-x-no_grad]",
    ),
    Mutant(
        "gradient in place of expanded logits", AUTOGRAD,
        " and logits.stride(0) >= logits.shape[1]", "",
        "test_cross_entropy.py::test_gradient_in_place_of_expanded_logits[triton]",
    ),
    Mutant(
        "saved gradient scaled in place", AUTOGRAD,
        "dx = dx * scale if", "dx = dx.mul_(scale) if",
        "test_linear_cross_entropy.py::test_every_subset_of_gradients_twice[triton]",
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
        "test_linear_cross_entropy.py::test_one_chunk_of_logits_at_a_time[triton]",
    ),
    # the way to a kernel
    Mutant(
        "a block ends the newest", DISPATCH,
        "stack[:] = [other for other in stack if other is not entry]", "stack.pop()",
        "test_dispatch_threads.py::test_blocks_may_end_in_any_order",
    ),
    Mutant(
        "fallback without a word", DISPATCH,
        '_say_once(op, "; ".join(reasons))', "pass",
        "test_attention.py::test_other_head_sizes_fall_back_with_a_reason[8]",
    ),
    Mutant(
        "forced backend falls back", DISPATCH,
        'raise BackendUnavailable(f"{chosen} cannot serve {op}: {reason}")', 'return "reference"',
        "test_layer_norm.py::test_longer_rows_fall_back_with_a_reason",
    ),
    Mutant(
        "gradients of the first input alone", AUTOGRAD,
        "x.requires_grad for x in args", "x.requires_grad for x in args[:1]",
        "test_dispatch.py::test_autograd_is_left_out_where_nothing_needs_a_gradient"
        "[triton-layer_norm]",
    ),
    Mutant(
        "forward mode lost", REFERENCE,
        " or forward_ad._current_level >= 0", "",
        "test_derivatives.py::test_a_forced_backend_says_that_it_cannot[triton]",
    ),
    Mutant(
        "gradients without a graph", AUTOGRAD,
        "return torch.is_grad_enabled() and not", "return False and not",
        "test_derivatives.py::test_hessian_of_a_loss[triton]",
    ),
    Mutant(
        "gradients through the history of another input", AUTOGRAD,
        "inputs = [x.view_as(x) for x in inputs]", "inputs = list(inputs)",
        "test_derivatives.py::test_second_derivatives[triton-causal_attention]",
    ),
    Mutant(
        "one over no targets", AUTOGRAD,
        "dloss / count.clamp(min=1)", "dloss / count",
        "test_cross_entropy.py::test_no_target_counts[triton-3-mean-0.0]",
    ),
    Mutant(
        "the residual's gradient in 16 bits", NORM,
        "store_rows(dresidual_ptr, dx, offs_row",
        "store_rows(dresidual_ptr, dx.to(tl.bfloat16), offs_row",
        "test_layer_norm.py::test_float32_stream_is_not_rounded[triton-bf16]",
    ),
]  # fmt: skip
