"""Chooses the backend of a call, and explains why others are not used.

A backend is a module with two functions:

    why_not(op, device, dtype, size) -> str | None     # None: supported; else the reason
    module(op) -> module                               # holds attention_fwd, attention_bwd, ...

size is the only extent that a kernel may not support: the head size D of attention, the row length
C of a norm. `reference` is not such a module: ops.py calls it directly, and PyTorch differentiates
it. The backward runs on the forward's backend.
"""

import contextlib
import os
import sys
import threading
import warnings
from typing import NamedTuple

import torch

from . import recorder, reference, triton
from .gpu import unsuitable
from .linear_cross_entropy import DEFAULT, Chunks
from .native import cpu, cuda, libraries
from .tracing import untraced

BACKENDS = ("triton", "cuda", "cpu", "reference")

# The backends of an op, in order of preference. On an NVIDIA GPU triton comes before cuda, because
# nvcc takes most of a minute to build cuda's library. The figures are kernel times on an H200 in
# bfloat16, triton's against cuda's (docs/log.md, 2026-11-27). On a CPU there is only cpu, measured
# against plain PyTorch in docs/log.md (and triton, in its interpreter). Inside torch.compile, GELU
# is left to Inductor, which fuses it into the neighbouring operations; a kernel cannot be fused.
PRIORITY = {
    # T = 512, 1024, 2048, 4096: forward 66, 101, 170, 308 µs against 82, 130, 229, 420; backward
    # 1.5 to 1.7 times as fast
    "attention": ("triton", "cuda", "cpu"),
    "decode_attention": ("triton", "cuda", "cpu"),  # see FASTER
    "linear": ("cpu",),  # on a GPU PyTorch's own product is used
    # 65536 x 768: forward 58 µs against 56, with the residual 101 against 104; backward 85 against
    # 88, with the residual 106 against 127, and in float32 215 against 323
    "layer_norm": ("triton", "cuda", "cpu"),
    # 32768 x 3072: backward 141 µs against 154; with the bias 101 against 121, backward 157 against
    # 207
    "gelu": ("triton", "cuda", "cpu"),
    # 8192 x 50257: forward 193 µs against 231, backward 448 against 430
    "cross_entropy": ("triton", "cuda", "cpu"),
    "linear_cross_entropy": ("triton", "cuda", "cpu"),  # see FASTER
}
OPS = tuple(PRIORITY)


class Faster(NamedTuple):
    """A backend that is faster on a GPU than the first of PRIORITY. It is preferred if its library
    is already built."""

    backend: str
    than: str
    measured: str  # a sentence for the report


FASTER = {
    "decode_attention": Faster(
        "cuda", "triton", "7, 11, 58 µs against 7, 12, 79 for 1024 cached rows, B = 1, 8, 64 (H200)"
    ),
    "linear_cross_entropy": Faster(
        "cuda", "triton", "458 µs against 526 for the loss of 8192 x 50257 in place (H200)"
    ),
}

_TRANSFORMED = "transforms of torch.func and forward-mode derivatives take plain PyTorch"
# The folders of gpt2 and torch: a warning names the line that called them.
_PACKAGES = (os.path.dirname(os.path.dirname(__file__)) + os.sep, os.path.dirname(torch.__file__))
_MODULES = {"triton": triton, "cuda": cuda, "cpu": cpu}
_said: set[tuple[str, str]] = set()
_built: dict[str, bool] = {}


class _Own(threading.local):
    """The use() blocks that this thread is in, newest last. Each entry is a list of one backend, so
    that entries can be told apart by identity."""

    def __init__(self):
        self.entries: list[list[str]] = []


_own = _Own()
_all: list[list[str]] = []  # the use() blocks of all threads
_newest: str | None = None  # the backend of the newest of these
_changes = 0
_entering = threading.Lock()


class BackendUnavailable(RuntimeError):
    """A forced backend does not support a call; the message has the reason."""


@contextlib.contextmanager
def use(backend: str):
    """Force `backend`, one of BACKENDS, for every op called inside the with block.

    It applies to the thread that enters the block, and to threads without a block of their own,
    such as those in which autograd runs a backward. The newest block wins. A forked child keeps
    only the blocks of the thread that forked.

    Raises ValueError for an unknown name. Inside the block, an op that the backend does not support
    raises BackendUnavailable with the reason instead of falling back.
    """
    global _newest, _changes
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    stacks, entry = (_own.entries, _all), [backend]
    with _entering:
        for stack in stacks:
            stack.append(entry)
        _newest = backend
        _changes += 1
    try:
        yield
    finally:
        with _entering:
            for stack in stacks:  # blocks of different threads may end in any order
                stack[:] = [other for other in stack if other is not entry]
            _newest = _all[-1][0] if _all else None
            _changes += 1


def changes() -> int:
    """How many use() blocks of this process have begun or ended."""
    return _changes


def _forget_other_threads() -> None:
    """Keeps only this thread's blocks in a forked child. Other threads do not exist there, so their
    blocks would never end, and a lock that one of them held would never be released."""
    global _entering, _newest
    _entering = threading.Lock()
    _all[:] = _own.entries
    _newest = _all[-1][0] if _all else None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)


def forced() -> str | None:
    """The backend that use() forces for this thread, or None. torch.compile traces this, so a
    compiled function is recompiled when the result changes."""
    own = _own.entries
    return own[-1][0] if own else _newest


def choose(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str:
    """The name of the backend for this call.

    If no kernel supports it, warns once and returns "reference". Raises BackendUnavailable if a
    forced backend does not support it.
    """
    chosen = forced()  # read only once, because another thread may leave its block meanwhile
    if chosen == "reference":
        return _reference()
    if reference.is_transformed():
        if chosen is not None:
            raise BackendUnavailable(f"{chosen} cannot serve {op}: {_TRANSFORMED}")
        _say_once(op, _TRANSFORMED)
        return _reference()
    if chosen is not None:
        reason = why_not(chosen, op, device, dtype, size)
        if reason is not None:
            raise BackendUnavailable(f"{chosen} cannot serve {op}: {reason}")
        return chosen
    reasons = []
    for name in _candidates(op, device):
        reason = why_not(name, op, device, dtype, size)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if device.type == "cpu" and "cpu" in PRIORITY[op] and (missing := cpu._library_reason()):
        _say_no_library(missing)
    else:
        _say_once(op, "; ".join(reasons))
    return _reference()


def _reference() -> str:
    """ "reference", whose operators PyTorch chooses by settings that no recording knows."""
    recorder.refuse("plain PyTorch computes it")
    return "reference"


def _candidates(op: str, device: torch.device) -> tuple[str, ...]:
    """The backends to try for this op, in order."""
    faster = FASTER.get(op)
    if faster is not None and faster.backend in PRIORITY[op] and _is_ready(faster.backend, device):
        return (faster.backend, *PRIORITY[op])
    return PRIORITY[op]


def _is_ready(backend: str, device: torch.device) -> bool:
    return device.type == "cuda" and _library_is_built(backend)


@untraced
def _library_is_built(name: str) -> bool:
    """Whether a library is built. Decided once per process, so that choices do not change."""
    if name not in _built:
        _built[name] = libraries.unbuilt(name) is None
    return _built[name]


def kernel_for(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend with a kernel for this call, or None. For an op that PyTorch normally computes,
    so no kernel is no reason for a warning, nor for an error if a backend is forced."""
    if reference.is_transformed():
        return None
    chosen = forced()
    names = PRIORITY[op] if chosen is None else (chosen,)
    can_serve = (n for n in names if n != "reference" and why_not(n, op, device, dtype) is None)
    return next(can_serve, None)


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype, size: int = 0):
    """The reason why `backend` does not support the call, as a short phrase; None if it does."""
    return None if backend == "reference" else _MODULES[backend].why_not(op, device, dtype, size)


def logits_chunks(backend: str, dtype: torch.dtype) -> Chunks:
    """The layout of linear_cross_entropy's logits on this backend, for x of this dtype."""
    return cpu.logits_chunks(dtype) if backend == "cpu" else DEFAULT


def module(backend: str, op: str):
    """The module with this backend's launchers for `op`."""
    return _MODULES[backend].module(op)


@untraced
def _say_once(op: str, reason: str) -> None:
    if (op, reason) not in _said:
        _said.add((op, reason))
        frame, level = sys._getframe(), 1
        while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGES):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"{op} falls back to plain PyTorch ({reason})", stacklevel=level)


@untraced
def _say_no_library(reason: str) -> None:
    """Warns once that the CPU library is missing; this one warning covers all ops."""
    if ("", reason) not in _said:
        _said.add(("", reason))
        message = f"plain PyTorch computes in place of every kernel: {reason}"
        warnings.warn_explicit(message, UserWarning, "gpt2.kernels", 0)  # shows no line of code


def report() -> str:
    """The table of python -m gpt2.kernels: for each op, the backend that computes it on this
    machine, and for every backend "yes" or the reason why it does not support the op. The sizes are
    GPT-2's: D = 64, C = 768.

    Builds the CPU library if necessary, as a first call would, but never the CUDA library. If that
    would be faster, lines below the table name the ops and the command that builds it.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    suits = on_gpu and unsuitable("cuda", device.index) is None
    unbuilt = libraries.unbuilt("cuda") if suits else None
    rows = [("op", "served by", *BACKENDS)]
    for op in OPS:
        size = {"attention": 64, "decode_attention": 64, "layer_norm": 768}.get(op, 0)
        unasked = unbuilt if "cuda" in PRIORITY[op] else None  # why_not would build it
        reasons = {
            b: unasked if b == "cuda" and unasked else why_not(b, op, device, dtype, size)
            for b in BACKENDS
        }
        order = (*_candidates(op, device), "reference")
        served_by = next(b for b in order if reasons[b] is None or (b == "cuda" and unasked))
        if reasons[served_by] is not None:
            served_by += ", built first"
        rows.append((op, served_by, *(reasons[b] or "yes" for b in BACKENDS)))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    where = torch.cuda.get_device_name(device) if on_gpu else "no CUDA device"
    head = f"torch {torch.__version__}, {where}; {dtype} on {device.type}"
    return "\n".join([head, "", *(line.rstrip() for line in lines), *_advice(unbuilt)])


def _advice(unbuilt: str | None) -> list[str]:
    """Lines that name the ops for which cuda would be faster than Triton; none if cuda is built or
    Triton cannot be used."""
    if unbuilt is None or triton.import_error() is not None:
        return []
    faster = (f"  {name}: {faster.measured}" for name, faster in FASTER.items())
    return ["", f"cuda would be faster here ({unbuilt}):", *faster]
