"""Where the time of a forward goes: the calls that lie inside one another, and what each adds."""

import contextlib
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from host_clock import within
from host_report import PARTS

from gpt2.kernels import autograd, dispatch, raw_ops

CHOICES = ("choose", "choose_backward", "kernel_for")


def taken_apart(run: Callable, context: Callable) -> dict[str, tuple]:
    """By the name of its part: a forward and the calls inside it, with the contexts around their
    runs."""
    with context():
        calls = run, *nested_calls(run)
    inside = partial(within, context, torch.no_grad)  # as Function.forward runs
    found = zip(PARTS, calls, (context, inside, context, inside, inside), strict=True)
    return {part: (call, around) for part, call, around in found if call is not None}


def summed(ms: dict[str, float]) -> dict[str, float]:
    """The parts of a forward in µs, from the times of what taken_apart found. The choice of a
    backend is beside the other calls, not around them: it takes its own time and theirs."""
    nested = dict(ms)
    if "dispatch" in ms:
        nested["dispatch"] += next((ms[part] for part in PARTS[2:] if part in ms), 0.0)
    return {part: 1e3 * t for part, t in parts(nested).items()}


def parts(nested: dict[str, float]) -> dict[str, float]:
    """What each of some nested calls adds to the one inside it: nested has their times, the
    outermost first. An inner call that was measured to be slower than the outer counts as equally
    slow: no part is negative, and they add up to the outermost."""
    names, times = list(nested), []
    for time in nested.values():
        times.append(min([time, *times[-1:]]))
    inner = [*times[1:], 0.0]
    return {name: time - less for name, time, less in zip(names, times, inner, strict=True)}


def nested_calls(call: Callable) -> tuple[Callable | None, ...]:
    """The calls that `call` makes on its way to a kernel, each as a function of nothing: the choice
    of a backend, Function.apply, the raw op, the backend's launcher. None where it makes none.

    They are observed in one run and have its very arguments, so that a change of the package needs
    no change here."""
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
    """What a raw op runs, without torch.library around it."""
    name = raw.func.name().partition("::")[2].partition(".")[0]
    *args, backend = raw.args
    if name == "linear_cross_entropy_fwd":  # the products and a launcher, together
        return partial(raw_ops.launch_linear_cross_entropy, *args, backend)
    modules = (dispatch.module(backend, op) for op in dispatch.OPS if has_module(backend, op))
    return partial(next(getattr(m, name) for m in modules if hasattr(m, name)), *args)


def has_module(backend: str, op: str) -> bool:
    try:
        dispatch.module(backend, op)
    except ImportError:  # no module of its own: triton serves linear_cross_entropy by another's
        return False
    return True
