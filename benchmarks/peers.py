"""Other people's kernels: how each is called, and why it cannot be where it is not installed.

Versions stand in every result's environment (machine.py). A peer that is missing is a reason in
the table, never an error.
"""

import importlib
from collections.abc import Callable

import torch
from contest import Contender

# FlashAttention's generations: name here -> module, its public function in all of them
FLASH = {"flash-2": "flash_attn", "flash-3": "flash_attn_interface", "flash-4": "flash_attn.cute"}


def compiled(name: str, call: Callable) -> Contender:
    return Contender(name, torch.compile(call, dynamic=False))


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
    """Every generation that is installed: call(its function, *inputs) -> tensor, of (B, T, H, D).
    Some return the softmax statistics as well; they are dropped."""
    for name, module in FLASH.items():
        library, reason = imported(module, device)
        found = getattr(library, function, None)
        if reason is None and found is None:
            reason = f"{module} has no {function}"
        if reason:
            yield Contender(name, None, why_not=reason)
            continue

        def run(*inputs, found=found):
            o = call(found, *inputs)
            return o[0] if isinstance(o, tuple) else o

        yield Contender(name, run)
