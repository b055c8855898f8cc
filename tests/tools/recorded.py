"""Calls that tests record and replay: their arguments, and a function with its calls recorded."""

import contextlib

import torch
from inputs import targets_in, tensor
from util import DEVICE, bits_equal

from gpt2.kernels import recording

CALLS = recording.UNRECORDED + 1  # the last of them is recorded


@contextlib.contextmanager
def recorded(function):
    """function with its calls recorded, as for a public op."""
    call = recording.recorded(function)
    recording._sites[-1].start()
    yield call
    recording._sites.pop()


def gradients(function, args, options=None, spread=False):
    """The results, and the gradients of the tensors that require one, for random gradients of the
    results; with spread for one number, expanded."""
    found = function(*args, **(options or {}))
    outputs = found if isinstance(found, tuple) else (found,)
    wanted = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    of_outputs = [
        torch.randn((), device=y.device).to(y.dtype).expand_as(y) if spread else torch.randn_like(y)
        for y in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, wanted, of_outputs)]


def check_replay(function, make, options=None, spread=False, times=CALLS + 3, **context):
    """Calls function(*make(), **options) and its undecorated form, which is never replayed, several
    times with new values, and compares the bits."""
    for seed in range(times):
        found = []
        for run in (function, function.__wrapped__):
            torch.manual_seed(seed)
            with torch.autocast(DEVICE, **context) if context else contextlib.nullcontext():
                found.append(gradients(run, make(), options, spread))
        for ours, python in zip(*found, strict=True):
            assert bits_equal(ours, python), f"call {seed}"
            assert ours.stride() == python.stride()


def leaf(*shape, dtype=torch.float32):
    return tensor(*shape, dtype=dtype).requires_grad_()


def loss_inputs():
    return leaf(12, 33), targets_in(12, 33)


def head_inputs(dtype=torch.float32):
    return leaf(2, 6, 16, dtype=dtype), leaf(33, 16), targets_in(12, 33).view(2, 6)


CASES = {
    "causal_attention": lambda: [leaf(2, 9, 2, 16) for _ in "qkv"],
    "causal_attention-views": lambda: leaf(2, 9, 3, 2, 16).unbind(2),
    "causal_attention_qkv": lambda: (leaf(2, 9, 96), 2),
    "layer_norm": lambda: (leaf(3, 5, 32), leaf(32), leaf(32)),
    "layer_norm-alone": lambda: (leaf(3, 5, 32),),
    "layer_norm-frozen": lambda: (leaf(3, 5, 32), tensor(32), leaf(32)),
    "layer_norm-rows": lambda: (leaf(32, 5).t(), leaf(32), leaf(32)),
    "add_layer_norm": lambda: (leaf(3, 5, 32), leaf(3, 5, 32), leaf(32), leaf(32)),
    "add_layer_norm-mixed": lambda: (
        leaf(3, 5, 32, dtype=torch.bfloat16), leaf(3, 5, 32), leaf(32), leaf(32),
    ),
    "gelu": lambda: (leaf(7, 5),),
    "gelu-bf16": lambda: (leaf(7, 5, dtype=torch.bfloat16),),
    "bias_gelu": lambda: (leaf(7, 32), leaf(32)),
    "cross_entropy": loss_inputs,
    "linear_cross_entropy": head_inputs,
    "linear_cross_entropy-bf16": lambda: head_inputs(torch.bfloat16),
}  # fmt: skip
