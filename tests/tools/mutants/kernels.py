"""Bugs to plant in the other Triton kernels, in the products, and on the way to a kernel."""

from . import Mutant

LANG = "kernels/triton/lang.py"
NORM = "kernels/triton/layer_norm.py"
GELU = "kernels/triton/gelu.py"
LOSS = "kernels/triton/cross_entropy.py"
LINEAR = "kernels/linear_cross_entropy.py"
PRODUCT = "kernels/matmul.py"
AUTOGRAD = "kernels/autograd.py"
DISPATCH = "kernels/dispatch.py"
REFERENCE = "kernels/reference.py"
IDS = "kernels/ids.py"
BLOCK = "kernels/block.py"
LAYERS = "gpt2/layers.py"

KERNEL_MUTANTS = [
    # layer_norm
    Mutant(
        "lanes beyond C in the variance", NORM,
        "centred = tl.where(inside[None, :], centred, 0.0)", "pass",
        "kernels/test_layer_norm.py::test_mean_far_from_zero[triton-1000.0-C17-fp32]", quick=True,
    ),
    Mutant(
        "the last block of columns left out of dw", NORM,
        "next_dw = next_dw + (tl.fma(dys[i], xhats[i], dw[i]),)",
        "next_dw = next_dw + (tl.fma(dys[i], xhats[i], dw[i]) if i < 2 else dw[i],)",
        "kernels/test_layer_norm.py::test_layer_norm[triton-C768-N33-fp32-same]",
    ),
    # a block as a whole
    Mutant(
        "the sum of a gradient that was changed", "kernels/recorder.py",
        "return total if version == x._version else None", "return total",
        "kernels/test_block.py::test_a_bias_gradient_follows_changes_of_the_gradient[triton]",
    ),
    Mutant(
        "dk's sum in place of dv's", "kernels/triton/attention.py",
        "_store_sum(sums_ptr + past_dk, dv_tile,", "_store_sum(sums_ptr + past_dk, dk_tile,",
        "kernels/test_block.py::test_gradients[triton-fp32-later]",
    ),
    Mutant(
        "a hooked layer is bypassed", LAYERS,
        "if not is_stock(layer, kind):", "if False:",
        "kernels/test_block.py::test_a_changed_layer_is_called[hook_a_child]", quick=True,
    ),
    # gelu
    Mutant(
        "erf for tanh", LANG,
        "return x / (1.0 + _gelu_exp(x))",
        "return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))",
        "kernels/test_gelu.py::test_the_tanh_form[triton]",
    ),
    Mutant(
        "tail of the output stored", GELU,
        "gelu(x).to(y_ptr.dtype.element_ty), mask=offs < n)",
        "gelu(x).to(y_ptr.dtype.element_ty), mask=offs >= 0)",
        "kernels/test_gelu.py::test_gelu[triton-1.0-17-fp32]",
    ),
    Mutant(
        "gradient far left of 0", LANG,
        "return tl.where(x < -10.0, 0.0, grad)", "return grad",
        "kernels/test_gelu.py::test_extremes[triton-fp32]",
    ),
    Mutant(
        "NaN lost in a minimum", LANG,
        "tl.minimum(x, 10.0, propagate_nan=tl.PropagateNan.ALL)", "tl.minimum(x, 10.0)",
        "kernels/test_gelu.py::test_nan_stays_in_its_place[triton]",
    ),
    # cross_entropy
    Mutant(
        "one-hot left out", LOSS,
        "(shift - (1.0 - smoothing) * dloss)", "shift",
        "kernels/test_cross_entropy.py::test_leading_shapes[triton-(2, 3)]", quick=True,
    ),
    Mutant(
        "target beyond the vocabulary", LOSS,
        "ignore_index\n    inside = (target >= 0) & (target < V)",
        "ignore_index\n    inside = target >= 0",
        "kernels/test_changed_ids.py::test_every_pass_meets_targets_outside[triton-0.0]",
    ),
    Mutant(
        "log-sum-exp as one number", LOSS,
        "tl.log2(l) * LN2 + (m - x_target)", "(tl.log2(l) * LN2 + m) - x_target",
        "kernels/test_cross_entropy.py::test_large_logits[triton-10000.0]",
    ),
    Mutant(
        "rows in 32 bits", LOSS,
        "row * stride_row\n    target = tl.load(targets_ptr + row)\n    counts",
        "row.to(tl.int32) * stride_row\n    target = tl.load(targets_ptr + row)\n    counts",
        "kernels/test_cross_entropy.py::test_rows_that_overflow_int32[triton]",
    ),
    Mutant(
        "edges of a row left out", LOSS,
        "    l += tl.sum(tl.exp2((x_edge - m) * LOG2E), axis=0)\n", "",
        "kernels/test_cross_entropy_rows.py::test_rows_that_begin_anywhere[triton-20-bf16]",
    ),
    Mutant(
        "logits of an ignored row read", LOSS,
        "mask=mask & counts", "mask=mask",
        "kernels/test_cross_entropy.py::test_ignored_rows_add_nothing[triton]",
    ),
    Mutant(
        "gradient in place, unknown to autograd", AUTOGRAD,
        "torch.autograd.graph.increment_version(logits)", "pass",
        "kernels/test_cross_entropy.py::test_gradient_in_place_of_the_logits[triton-fp32]",
    ),
    Mutant(
        "last chunk alone in dweight", LINEAR,
        "beta=0 if first else 1", "beta=0",
        "kernels/test_linear_cross_entropy.py::test_linear_cross_entropy[triton-V65-N200-C16-fp32-same-none]",
    ),
    Mutant(
        "saved gradient scaled in place", AUTOGRAD,
        "dx = dx * scale if", "dx = dx.mul_(scale) if",
        "kernels/test_linear_cross_entropy.py::test_every_subset_of_gradients_twice[triton]",
    ),
    Mutant(
        "saved gradient of the weight scaled in place", AUTOGRAD,
        "dweight = (dweight * scale).to(weight.dtype) if", "dweight = dweight.mul_(scale) if",
        "kernels/test_linear_cross_entropy.py::test_every_subset_of_gradients_twice[triton]",
    ),
    Mutant(
        "padding of the weight not zeroed", LINEAR,
        "padded[V:].zero_()", "pass",
        "kernels/test_linear_cross_entropy.py::test_linear_cross_entropy[triton-V65-N200-C16-fp32-same-none]",
    ),
    # the products of the model and of the head
    Mutant(
        "operands not rounded", PRODUCT,
        "t.to(dtype).float()", "t.float()",
        "kernels/test_linear.py::test_operands_are_rounded_as_autocast_rounds_them[widened]",
    ),
    # the way to a kernel
    Mutant(
        "fallback without a word", DISPATCH,
        '_say_once(op, "; ".join(reasons))', "pass",
        "kernels/test_attention.py::test_other_head_sizes_fall_back_with_a_reason[8]",
    ),
    Mutant(
        "forced backend falls back", DISPATCH,
        'raise BackendUnavailable(f"{chosen} cannot serve {op}: {reason}")', 'return "reference"',
        "kernels/test_layer_norm.py::test_longer_rows_fall_back_with_a_reason",
    ),
    Mutant(
        "forward mode lost", REFERENCE,
        " or forward_ad._current_level >= 0", "",
        "kernels/test_derivatives.py::test_a_forced_backend_says_that_it_cannot[triton]",
    ),
    Mutant(
        "gradients through the history of another input", AUTOGRAD,
        "inputs = [x.view_as(x) for x in inputs]", "inputs = list(inputs)",
        "kernels/test_derivatives.py::test_second_derivatives[triton-causal_attention]",
    ),
    Mutant(
        "one over no targets", AUTOGRAD,
        "dloss / count.clamp(min=1)", "dloss / count",
        "kernels/test_cross_entropy.py::test_no_target_counts[triton-3-mean-0.0]",
    ),
    # ids
    Mutant(
        "an address from an id that nobody has checked yet", IDS,
        "inside = ids.clamp(0, size - 1)", "inside = ids",
        "kernels/test_ids.py::test_a_bad_id_computes_nan[65-False]", quick=True,
    ),
    Mutant(
        "an id beyond the last on a CPU", IDS,
        "low.item() and high.item() < size:", "low.item() and high.item() <= size:",
        "kernels/test_ids.py::test_each_id_on_a_cpu[None]", quick=True,
    ),
    Mutant(
        "a launch on the current GPU, not the tensor's", "kernels/raw_ops.py",
        "if not x.is_cuda or x.get_device() == torch.cuda.current_device():", "if True:",
        "kernels/test_raw_ops.py::test_launches_run_on_the_tensors_device", quick=True,
    ),
    Mutant(
        "a wait for the device", IDS,
        "valid = (inside == ids).all()", "valid = torch.tensor(torch.equal(inside, ids))",
        "kernels/test_ids.py::test_a_step_reads_no_value[0.0-True]", quick=True,
    ),
]  # fmt: skip
