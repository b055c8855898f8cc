"""Splits the time of a forward into parts: the nested calls, and the time that each adds."""

import contextlib
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from bench.host.host_clock import within
from bench.host.tables import PARTS
from gpt2.kernels import autograd, dispatch, raw_ops

CHOICES = ("choose", "kernel_for")


def taken_apart(run: Callable, context: Callable) -> dict[str, tuple]:
    """Part -> (call, context to run it in), for a forward and the calls nested inside it."""
    with context():
        calls = run, *nested_calls(run)
    inside = partial(within, context, torch.no_grad)  # as Function.forward runs
    found = zip(PARTS, calls, (context, inside, context, inside, inside), strict=True)
    return {part: (call, around) for part, call, around in found if call is not None}


def summed(ms: dict[str, float]) -> dict[str, float]:
    """The parts of a forward in µs, from the times in ms of taken_apart's calls. The choice of a
    backend runs beside the inner calls, not around them, so their time is added to it first."""
    nested = dict(ms)
    if "dispatch" in ms:
        nested["dispatch"] += next((ms[part] for part in PARTS[2:] if part in ms), 0.0)
    return {part: 1e3 * t for part, t in parts(nested).items()}


def parts(nested: dict[str, float]) -> dict[str, float]:
    """The time that each call adds to the call inside it. nested: name -> time, outermost first. An
    inner call that was measured slower than the outer counts as equally slow, so that no part is
    negative and the parts add up to the outermost call."""
    names, times = list(nested), []
    for time in nested.values():
        times.append(min([time, *times[-1:]]))
    inner = [*times[1:], 0.0]
    return {name: time - less for name, time, less in zip(names, times, inner, strict=True)}


def nested_calls(call: Callable) -> tuple[Callable | None, ...]:
    """The calls that `call` makes on its way to a kernel: the choice of a backend, Function.apply,
    the raw op, the backend's launcher. Each is a function without arguments, or None if `call`
    makes no such call.

    They are recorded in one run with its arguments, so that a change in gpt2.kernels needs no
    change here."""
    choices, functions, raws = [], [], []

    def noted(seen, function):
        def run(*args, **kwargs):
            seen.append(partial(function, *args, **kwargs))
            return function(*args, **kwargs)

        return run

    def apply(function, *args):
        functions.append(partial(function.apply, *args))
        return function.apply(*args)

    with contextlib.ExitStack() as stack:
        for name in CHOICES:
            replaced = noted(choices, getattr(dispatch, name))
            stack.enter_context(mock.patch.object(dispatch, name, replaced))
        stack.enter_context(mock.patch.object(autograd, "call", apply))
        ops = {name: noted(raws, op) for name, op in vars(autograd.raw).items()}
        stack.enter_context(mock.patch.multiple(autograd.raw, **ops))
        call()

    def choose():
        for choice in choices:
            choice()

    function, raw = (next(iter(seen), None) for seen in (functions, raws))
    return choose if choices else None, function, raw, raw and launcher(raw)


def launcher(raw: partial) -> Callable:
    """The function that a raw op runs, without torch.library around it."""
    name = raw.func.name().partition("::")[2].partition(".")[0]
    *args, backend = raw.args
    if name == "linear_cross_entropy_fwd":  # the matrix products and a launcher together
        return partial(raw_ops.launch_linear_cross_entropy, *args, backend)
    modules = (dispatch.module(backend, op) for op in dispatch.OPS if has_module(backend, op))
    return partial(next(getattr(m, name) for m in modules if hasattr(m, name)), *args)


def has_module(backend: str, op: str) -> bool:
    try:
        dispatch.module(backend, op)
    except ImportError:  # triton has no module of this name for linear_cross_entropy
        return False
    return True
