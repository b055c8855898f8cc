"""Other people's kernels: how each is called, and why it cannot be where it is not installed.

Versions stand in every result's environment (machine.py). A peer that is missing is a reason in
the table, never an error.
"""

import functools
import importlib
import inspect
from collections.abc import Callable

import torch
from contest import Contender

# FlashAttention's generations: name here -> module, its public function in all of them
FLASH = {"flash-2": "flash_attn", "flash-3": "flash_attn_interface", "flash-4": "flash_attn.cute"}


def compiled(name: str, call: Callable) -> Contender:
    return Contender(name, torch.compile(call, dynamic=False), compiles=True)


def autotuned(call: Callable, device: torch.device) -> Contender:
    """torch.compile that measures its own choices. Without CUDA graphs: a kernel is compared with
    kernels, and its launch belongs to both."""
    if device.type == "cpu":
        return Contender("max-autotune", None, why_not="its search takes minutes on a CPU")
    mode = "max-autotune-no-cudagraphs"
    return Contender("max-autotune", torch.compile(call, dynamic=False, mode=mode))


def imported(module: str, device: torch.device | None = None):
    """(the module, None), or (None, why not). Only kernels for GPUs are given a device."""
    if device is not None and device.type != "cuda":
        return None, "its kernels are for GPUs"
    try:
        return importlib.import_module(module), None
    except Exception as error:  # a library built for another torch fails in its own ways
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:160]


def liger(function: str, call: Callable) -> Contender:
    """call(liger's function, *inputs), where Liger is installed."""
    functional, reason = imported("liger_kernel.transformers.functional")
    if reason:
        return Contender("liger", None, why_not=reason)
    return Contender("liger", lambda *inputs: call(getattr(functional, function), *inputs))


def quack(module: str, call: Callable, device: torch.device) -> Contender:
    """call(QuACK's module, *inputs), where it is installed."""
    functions, reason = imported(f"quack.{module}", device)
    if reason:
        return Contender("quack", None, why_not=reason)
    return Contender("quack", lambda *inputs: call(functions, *inputs))


def flash(function: str, call: Callable, device: torch.device):
    """A contender per generation of FlashAttention: call(its function, *inputs) -> (B, T, H, D)."""
    for name in FLASH:
        yield _flash(name, name, function, call, device)


def deterministic_flash(function: str, call: Callable, device: torch.device) -> Contender:
    """FlashAttention-4 with a backward that adds in one order. The forward is flash-4's."""
    name = "flash-4-deterministic"
    return _flash(name, "flash-4", function, call, device, deterministic=True)


def _flash(name, generation, function, call, device, **options) -> Contender:
    """call(the generation's function with the options, *inputs). Some functions also return the
    softmax statistics, which are dropped."""
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

    return Contender(name, run, compiles=generation == "flash-4")  # the others come compiled


def parameters(function: Callable) -> set[str]:
    """The names of a function's parameters; none where Python cannot tell."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
