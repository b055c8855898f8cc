"""Kernels of other libraries: how to call each, or why it is not available.

Their versions are in every result's environment (environment.py). A missing peer appears in the
tables with its reason; it is not an error.
"""

import functools
import importlib
import inspect
from collections.abc import Callable

import torch

from bench.contenders import Contender

# FlashAttention's generations: name here -> module; all have the same public functions
FLASH = {"flash-2": "flash_attn", "flash-3": "flash_attn_interface", "flash-4": "flash_attn.cute"}


def compiled(name: str, call: Callable) -> Contender:
    return Contender(name, torch.compile(call, dynamic=False), compiles=True)


def autotuned(call: Callable, device: torch.device) -> Contender:
    """torch.compile that chooses kernels by timing them. Without CUDA graphs: launching counts for
    every contender."""
    if device.type == "cpu":
        return Contender("max-autotune", None, why_not="its search takes minutes on a CPU")
    mode = "max-autotune-no-cudagraphs"
    return Contender("max-autotune", torch.compile(call, dynamic=False, mode=mode))


def imported(module: str, device: torch.device | None = None):
    """(module, None), or (None, reason why not). Give a device for kernels that need a GPU."""
    if device is not None and device.type != "cuda":
        return None, "its kernels are for GPUs"
    try:
        return importlib.import_module(module), None
    except Exception as error:  # a library built for another torch may raise anything
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:160]


def liger(function: str, call: Callable) -> Contender:
    """A contender: call(Liger's function, *inputs), if Liger is installed."""
    functional, reason = imported("liger_kernel.transformers.functional")
    if reason:
        return Contender("liger", None, why_not=reason)
    return Contender("liger", lambda *inputs: call(getattr(functional, function), *inputs))


def quack(module: str, call: Callable, device: torch.device) -> Contender:
    """A contender: call(QuACK's module, *inputs), if QuACK is installed."""
    functions, reason = imported(f"quack.{module}", device)
    if reason:
        return Contender("quack", None, why_not=reason)
    return Contender("quack", lambda *inputs: call(functions, *inputs))


def flash(function: str, call: Callable, device: torch.device):
    """Contenders, one per FlashAttention generation: call(function, *inputs) -> (B, T, H, D)."""
    for name in FLASH:
        yield _flash(name, name, function, call, device)


def deterministic_flash(function: str, call: Callable, device: torch.device) -> Contender:
    """FlashAttention-4 with its deterministic backward. The forward is flash-4's."""
    name = "flash-4-deterministic"
    return _flash(name, "flash-4", function, call, device, deterministic=True)


def _flash(name, generation, function, call, device, **options) -> Contender:
    """A contender: call(the generation's function with the options, *inputs). Softmax statistics
    that some functions also return are dropped."""
    library, reason = imported(FLASH[generation], device)
    found = getattr(library, function, None)
    if reason is None and found is None:
        reason = f"{FLASH[generation]} has no {function}"
    if reason is None and (unknown := options.keys() - parameters(found)):
        reason = f"its {function} does not take {', '.join(sorted(unknown))}"
    if reason:
        return Contender(name, None, why_not=reason)

    def run(*inputs):
        o = call(functools.partial(found, **options), *inputs)
        return o[0] if isinstance(o, tuple) else o

    return Contender(name, run, compiles=generation == "flash-4")  # the others are compiled already


def parameters(function: Callable) -> set[str]:
    """The names of a function's parameters; empty if Python cannot inspect it."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
