"""Records what a call does, and lets C++ replay it: eager mode without the time of its Python code.

A call of an op checks its arguments, chooses a backend, passes autograd, allocates and launches.
For arguments of one kind (dtypes, shapes, strides, options) all of that is the same each time. So
after some calls of one kind the next is recorded (recorder.py): a dispatch mode notes every
operator that it runs, launch.py every Triton kernel, and autograd.py every function that has a
backward. csrc/replay replays the notes. A backward is recorded when it first runs.

The key of a call (csrc/replay/key.h) holds all that Python code may depend on, but no value of a
tensor. So a call that reads a value is not recorded, and neither is one that uses a tensor from
elsewhere. Subclasses of tensors, modes, transforms and torch.compile always run the Python code.

GPT2_KERNELS_REPLAY=0 turns it off.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .native import libraries
from .recorder import Recorder, Slot, as_tuple, current

LOAD_AFTER = 1000  # calls with gradients; after them, and after this time, a thread loads the
LOAD_AFTER_SECONDS = 30  # library, and builds it if necessary
UNRECORDED = 30  # calls of each kind, before the one that is recorded: that takes a millisecond


class _Site:
    """A recorded function. `call` is replaced as soon as the library is loaded."""

    def __init__(self, function: Callable):
        self.function, self.call, self.recorded = function, self._count, None

    def _count(self, *args, **kwargs):
        global _calls, _first_call
        if torch.is_grad_enabled():
            _calls += 1
            if _calls == 1:
                _first_call = time.monotonic()
            if _calls > LOAD_AFTER:
                self._load()
        return self.function(*args, **kwargs)

    def _load(self) -> None:
        global _loading
        if libraries.decided("replay"):
            self.start()
        elif not _loading and time.monotonic() - _first_call > LOAD_AFTER_SECONDS:
            _loading = True
            threading.Thread(target=why_not, daemon=True).start()

    def start(self) -> None:
        from .dispatch import forced  # which needs this module

        with _starting:
            if self.call != self._count:
                return
            if why_not() is None:
                record = functools.partial(_record, _library())
                # It lives as long as the process: a call refers to it without a count.
                self.recorded = _library().Recorded(self.function, record, forced, UNRECORDED)
                self.call = self.recorded.function()
            else:
                self.call = self.function


_sites: list[_Site] = []
_calls, _first_call, _loading = 0, 0.0, False
_starting = threading.RLock()


def recorded(function: Callable) -> Callable:
    """Marks a function of tensors, numbers and texts whose calls may be recorded. It returns a
    tensor or a tuple of tensors, and reads no values by tolist or numpy, which nothing notes."""
    site = _Site(function)
    _sites.append(site)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return site.call(*args, **kwargs)

    return call


def why_not() -> str | None:
    """None if calls can be replayed, else the reason. Builds the library if necessary."""
    if (setting := os.environ.get("GPT2_KERNELS_REPLAY", "1")) != "1":
        return f"GPT2_KERNELS_REPLAY={setting}"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "this Python has no GIL"
    return libraries.load("replay")


def report() -> str:
    """A line on whether calls are replayed here. Builds nothing."""
    wanted = os.environ.get("GPT2_KERNELS_REPLAY", "1") == "1"
    missing = libraries.unbuilt("replay") if wanted else None
    if missing is None:
        reason = why_not()
        return f"replay of calls: {'no: ' + reason if reason else 'yes'}"
    _, not_built, command = missing.partition("not built: ")
    return f"replay of calls: {'built in a training, or by ' + command if not_built else missing}"


@functools.cache
def _library():
    return libraries.python_function("replay", "gpt2_kernels_replay")((Slot, _precision))


def start() -> str | None:
    """Loads the library now, not after the first LOAD_AFTER calls. Returns why_not()."""
    global _calls
    reason, _calls = why_not(), LOAD_AFTER
    for site in _sites:
        site.start()
    return reason


def forget() -> None:
    """Forgets all recordings."""
    for site in _sites:
        if site.recorded is not None:
            site.recorded.forget()


@contextlib.contextmanager
def paused():
    """Runs the Python code of every call of this process, for tests and benchmarks."""
    calls = [(site, site.call) for site in _sites]
    for site, _ in calls:
        site.call = site.function
    try:
        yield
    finally:
        for site, call in calls:
            site.call = call


def _record(library, function: Callable, args: tuple, kwargs: dict):
    """(function(*args, **kwargs), its program or None)."""
    from . import dispatch  # which needs this module

    if current() is not None:  # a recorded function inside another
        return function(*args, **kwargs), None
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    recorder, changes = Recorder(library, inputs), dispatch.changes()
    with recorder.active():
        found = function(*args, **kwargs)
    if dispatch.changes() != changes:
        recorder.log.refuse("another thread has forced a backend meanwhile")
    return found, recorder.log.program(library, recorder.log.results(as_tuple(found)))


def _precision() -> str:
    """What float32 kernels on a GPU depend on."""
    return torch.backends.cuda.matmul.fp32_precision
