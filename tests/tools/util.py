"""Compares kernels with the reference, and defines the allowed errors.

A result and every gradient are compared with the reference in float64. A kernel's error may be at
most twice plain PyTorch's error at the same precision (three times for gradients), plus the
rounding of the last bit. No tolerance is set by hand. See assert_close_to.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from gpt2 import kernels
from gpt2.kernels import block, dispatch, recording

TOOLS = str(Path(__file__).resolve().parent)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_op(
    op: str,
    inputs: Mapping[str, Tensor],
    *,
    backend: str,
    ran: Callable[[str], None],
    terms: float = 0.0,
    rounding: float = 0.0,
    **kwargs,
) -> None:
    """kernels.<op>(**inputs, **kwargs) on `backend`, and its gradients, against kernels.reference.

    terms is the size of the numbers that cancel in a gradient (see assert_close_to). rounding is
    the error of an output that rounding the operands may cause: for a single number, such as a
    loss, plain PyTorch's error can be much smaller by chance.
    """
    fast, plain = getattr(kernels, op), getattr(kernels.reference, op)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    before = {name: fingerprint(x) for name, x in inputs.items()}
    saved = []  # tensors that the forward saved, and their values
    note = torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.append((x, fingerprint(x))), x)[1], lambda x: x
    )
    with kernels.use(backend), launches() as launched, note:
        outputs = as_tuple(fast(**leaves, **kwargs))
        grad_outputs = [torch.randn_like(y) for y in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs)
    assert all(name == backend for name in launched), f"ran on {set(launched)}, not {backend}"
    assert launched or backend == "reference" or not outputs[0].numel(), "no kernel was launched"
    for name, x in inputs.items():
        assert fingerprint(x) == before[name], f"{name} was changed"
    assert all(fingerprint(x) == held for x, held in saved), "a saved tensor was changed"

    def run_plain(dtype=None):
        xs = {n: x.detach().to(dtype or x.dtype, copy=True) for n, x in inputs.items()}
        for x in xs.values():
            x.requires_grad_()
        ys = as_tuple(plain(**xs, **kwargs))
        gs = [g.to(y.dtype) for g, y in zip(grad_outputs, ys, strict=True)]
        return ys, torch.autograd.grad(ys, list(xs.values()), gs)

    exact_outputs, exact_grads = run_plain(torch.float64)
    plain_outputs, plain_grads = run_plain()
    for i, y in enumerate(outputs):
        noise = rounding / torch.finfo(y.dtype).eps
        assert_close_to(exact_outputs[i], y, plain_outputs[i], f"output {i}", factor=2, terms=noise)
        ran(backend)
    ulp = max(torch.finfo(x.dtype).eps for x in inputs.values())  # a float32 weight's gradient too
    for name, g, e, p in zip(leaves, grads, exact_grads, plain_grads, strict=True):
        assert_close_to(e, g, p, f"gradient of {name}", factor=3, terms=terms, ulp=ulp)
        ran(backend)


def assert_close_to(
    exact: Tensor,
    x: Tensor,
    plain: Tensor,
    what: str,
    *,
    factor: float,
    terms: float = 0.0,
    ulp: float | None = None,
) -> None:
    """x errs by at most factor times as much as plain, against exact, in the largest error and in
    the root mean square.

    Both bounds include a floor for rounding: ulp (by default one unit in the last place of x's
    dtype) at the size of the result, and at the size of `terms`, rounded numbers that cancel in it.
    For few numbers it is four units, because plain PyTorch's error can be small by chance.
    """
    assert x.shape == exact.shape, f"{what}: shape {tuple(x.shape)}, not {tuple(exact.shape)}"
    if not exact.numel():
        return
    ulp = ulp or torch.finfo(x.dtype).eps
    x, plain = x.double(), plain.double()
    assert bool((x.isnan() == exact.isnan()).all()), f"{what}: NaN in the wrong places"
    for measure, name in ((_largest, "largest error"), (_root_mean_square, "rms error")):
        error, allowed = measure(x - exact), factor * measure(plain - exact)
        floor = ulp * (measure(exact) + terms) * (4 if exact.numel() < FEW else 1)
        assert error <= allowed + floor, (
            f"{what}: {name} {error:.3g}, but plain PyTorch's is {allowed / factor:.3g} "
            f"(NaN left out: {int((plain.isnan() & ~exact.isnan()).sum())}) "
            f"and the rounding floor {floor:.3g}"
        )


def _largest(x: Tensor) -> float:
    return x.nan_to_num(posinf=math.inf, neginf=-math.inf).abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.nan_to_num().square().mean().sqrt().item()


class launches:
    """The backends whose launchers were called inside the with block, in order. Calls are not
    replayed meanwhile, because a replay calls no launcher."""

    def __enter__(self) -> list[str]:
        self.paused = recording.paused()
        self.paused.__enter__()
        self.module, self.block_ops, names = dispatch.module, block._ops, []

        def spy(backend, op):
            names.append(backend)
            return self.module(backend, op)

        def spied_ops(*backends):
            before = len(names)
            ops = self.block_ops(*backends)
            del names[before:]  # looked up, not called
            return ops and SimpleNamespace(
                **{
                    name: counted(function, backends[0]) if callable(function) else function
                    for name, function in vars(ops).items()
                }
            )

        def counted(function, backend):
            def call(*args, **kwargs):
                names.append(backend)
                return function(*args, **kwargs)

            return call

        dispatch.module, block._ops = spy, spied_ops
        return names

    def __exit__(self, *exc):
        dispatch.module, block._ops = self.module, self.block_ops
        self.paused.__exit__(*exc)


def environment(**changes: str) -> dict[str, str]:
    """The environment for another pytest process, without the variables of this run."""
    ours = ("GPT2_EXPECT", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return (
        kept
        | {"PYTHONPATH": os.pathsep.join([TOOLS, *filter(None, [kept.get("PYTHONPATH")])])}
        | changes
    )


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def fingerprint(x: Tensor) -> str:
    return hashlib.sha256(bytes_of(x).cpu().numpy().tobytes()).hexdigest()


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, compared on a's device; NaN equals itself."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(bytes_of(a), bytes_of(b).to(a.device))


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of x in one dimension. A loss has no dimension, so it cannot be viewed as bytes
    itself."""
    return x.detach().reshape(-1).contiguous().view(torch.uint8)


def why_no_vocabulary() -> str | None:
    """None if GPT-2's vocabulary is available, else the reason for a skip, with what to set."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if folder and all((Path(folder) / name).is_file() for name in _VOCABULARY):
        return None
    return (
        "set TIKTOKEN_CACHE_DIR to a folder with tiktoken's two files of GPT-2's vocabulary; "
        "tiktoken.get_encoding('gpt2') downloads them into it"
    )


# File names in tiktoken's cache: SHA-1 of the addresses of vocab.bpe and encoder.json.
_VOCABULARY = (
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)


def guarded(x: Tensor, width: int = 64) -> Tensor:
    """A copy of x between bands of NaN, so that reads past either end change the result."""
    n = x.numel()
    buffer = torch.full((n + 2 * width,), float("nan"), dtype=x.dtype, device=x.device)
    buffer[width : width + n] = x.flatten()
    return buffer[width : width + n].view(x.shape)
