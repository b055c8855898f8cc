"""Which backend serves a call, and why the others do not.

A backend is a module with two functions,

    why_not(op, device, dtype, size) -> str | None     # None: it can serve; else a human reason
    module(op) -> module                               # holds attention_fwd, attention_bwd, ...

where size is the one extent that a kernel may not support: the head size D of attention, the row
length C of a norm. `reference` is no such module: ops.py calls it directly, and autograd does the
rest. The choice is made once, in the forward; the backward uses the same backend.
"""

import contextlib
import warnings

import torch

from . import cpu, cuda, triton

BACKENDS = ("triton", "cuda", "cpu", "reference")

# Who is asked, in order, and why triton before cuda, whose library takes nvcc a minute to build. On
# a CPU there is only cpu (and triton, in its interpreter), measured against plain PyTorch in
# docs/log.md. Elementwise GELU is left to Inductor inside torch.compile: it fuses into its
# neighbours there, which a kernel of its own never can.
PRIORITY = {
    "attention": ("triton", "cuda", "cpu"),  # not measured
    "decode_attention": ("triton", "cuda", "cpu"),  # not measured
    "gemv": ("cpu",),  # elsewhere PyTorch's own product serves, and nothing is missing
    "layer_norm": ("triton", "cuda", "cpu"),  # not measured
    "gelu": ("triton", "cuda", "cpu"),  # not measured
    "cross_entropy": ("triton", "cuda", "cpu"),  # not measured
}
OPS = tuple(PRIORITY)

_MODULES = {"triton": triton, "cuda": cuda, "cpu": cpu}
_forced: str | None = None  # process-wide, so that autograd's threads and torch.compile see it
_said: set[tuple[str, str]] = set()


class BackendUnavailable(RuntimeError):
    """A forced backend cannot serve a call; the message holds every reason."""


@contextlib.contextmanager
def use(backend: str):
    """Force `backend`, one of BACKENDS, for every op called inside the with block.

    Process-wide, not per thread. Raises ValueError for an unknown name; an op that the backend
    cannot serve raises BackendUnavailable with the reason instead of falling back.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def choose(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str:
    """The name of the backend that serves this call."""
    if _forced == "reference":
        return "reference"
    if _forced is not None:
        reason = why_not(_forced, op, device, dtype, size)
        if reason is not None:
            raise BackendUnavailable(f"{_forced} cannot serve {op}: {reason}")
        return _forced
    reasons = []
    for name in PRIORITY[op]:
        reason = why_not(name, op, device, dtype, size)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    _say_once(op, "; ".join(reasons))
    return "reference"


def kernel_for(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend with a kernel for this call, or None: for an op that PyTorch serves as a rule, so
    that there is nothing to say, and nothing to raise where a backend without one is forced."""
    names = PRIORITY[op] if _forced is None else (_forced,)
    can_serve = (n for n in names if n != "reference" and why_not(n, op, device, dtype) is None)
    return next(can_serve, None)


def is_forced() -> bool:
    """Whether this happens inside a use() block."""
    return _forced is not None


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype, size: int = 0):
    """None where `backend` can serve the call, else the reason as a short phrase."""
    return None if backend == "reference" else _MODULES[backend].why_not(op, device, dtype, size)


def module(backend: str, op: str):
    """The module that holds this backend's launchers of `op`."""
    return _MODULES[backend].module(op)


def _say_once(op: str, reason: str) -> None:
    if (op, reason) not in _said:
        _said.add((op, reason))
        warnings.warn(f"{op} falls back to plain PyTorch ({reason})", stacklevel=4)


# torch.compile calls it instead of tracing it: what torch.compiler.assume_constant_result sets,
# without importing the compiler, which takes longer than all the rest of this package.
_say_once._dynamo_marked_constant = True


def report() -> str:
    """The table of python -m gpt2.kernels: per op the backend that serves it on this machine, and
    for every backend "yes" or the reason why it cannot. Sampled at GPT-2's sizes, D = 64, C = 768.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = [("op", "served by", *BACKENDS)]
    for op in OPS:
        size = {"attention": 64, "decode_attention": 64, "layer_norm": 768}.get(op, 0)
        reasons = {b: why_not(b, op, device, dtype, size) for b in BACKENDS}
        served_by = next(b for b in (*PRIORITY[op], "reference") if reasons[b] is None)
        rows.append((op, served_by, *(reasons[b] or "yes" for b in BACKENDS)))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    where = torch.cuda.get_device_name(device) if on_gpu else "no CUDA device"
    head = f"torch {torch.__version__}, {where}; {dtype} on {device.type}"
    return "\n".join([head, "", *(line.rstrip() for line in lines)])
