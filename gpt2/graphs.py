"""CUDA graphs: a step is captured once, and each replay launches all of its kernels at once.

    step = gpt2.graphed(model)
    loss = step(idx, targets)      # forward and backward: .grad is what loss.backward() leaves
    optimizer.step()
    optimizer.zero_grad()

A replay computes what was captured, from the values that the same tensors have now. Random numbers
are new: a replay first copies the seed and the offset of the generator to the device, and then
advances the generator as an eager step does. So dropout masks equal those of eager steps, also
after torch.manual_seed.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .kernels import dispatch
from .kernels.checks import check_ids, check_number
from .layers import is_hooked
from .model import IGNORED, Model

LIMIT = 16  # graphs: each holds its results, and together they hold one pool of memory


def supports(device: torch.device) -> bool:
    """Whether work on device can be captured."""
    return device.type == "cuda"


def signature(*tensors: Tensor) -> tuple:
    """What a graph fixes of its arguments."""
    return tuple((x.shape, x.dtype, x.device) for x in tensors)


class Captured:
    """A function of tensors as a CUDA graph. A call overwrites the result of the last one.

    The function must have run before, because kernels are compiled and libraries initialized at
    their first use. The capture itself computes nothing.
    """

    def __init__(self, function: Callable, inputs: tuple[Tensor, ...], pool, stream):
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.result = function(*self.inputs)
        except BaseException:
            torch.cuda.set_stream(current)  # the context leaves `stream` current after an error
            raise

    def __call__(self, *inputs: Tensor) -> Any:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.result


class Replays:
    """Calls functions of tensors: eagerly the first time, and as a CUDA graph from the second on.

    There is one graph for each key. It must contain everything that the function depends on, the
    signature of its arguments included, except the values of tensors that stay where they are. All
    graphs use one pool of memory, so a result is valid until the next call.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.graphs: dict[Hashable, Captured | None] = {}  # None: not captured yet
        self.eager: set[Hashable] = set()  # cannot be captured
        self.pool, self.stream = None, None
        self.is_full = False

    def __call__(self, key: Hashable, function: Callable, *inputs: Tensor) -> Any:
        if key not in self.graphs:
            result = function(*inputs)
            if key not in self.eager:
                self._make_room_for(key)
            return result
        if self.graphs[key] is None:
            try:
                self._capture(key, function, inputs)
            except Exception as e:
                del self.graphs[key]
                if not self.eager:
                    reason = f"{type(e).__name__}: {e}".partition("\n")[0]
                    warnings.warn(f"no CUDA graph can be captured: {reason}", stacklevel=3)
                self.eager.add(key)
                return function(*inputs)
        return self.graphs[key](*inputs)

    def _make_room_for(self, key: Hashable) -> None:
        if len(self.graphs) < LIMIT:
            self.graphs[key] = None
        elif not self.is_full:
            self.is_full = True
            warnings.warn(
                f"{LIMIT} CUDA graphs are held; other shapes and settings run without", stacklevel=4
            )

    def _capture(self, key: Hashable, function: Callable, inputs: tuple[Tensor, ...]) -> None:
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        self.graphs[key] = Captured(function, inputs, self.pool, self.stream)


def graphed(model: Model) -> Callable[..., Tensor]:
    """A function step(idx, targets, scale=1.0) that replays forward and backward of model's loss.

    It returns the loss, detached, and leaves in .grad what (loss * scale).backward() would, bit for
    bit: it adds to gradients that are there. idx and targets are those of the model; scale is a
    number or a tensor of one, 1 by default: 1 / n for the mean of n calls, or GradScaler's. Call it
    under the autocast and in the mode (train or eval) that the model should run in. The optimizer
    may zero the gradients either way.

    Where graphs are impossible, on a CPU for example, the step runs eagerly, and a warning gives
    the reason once. The gradients stay at one place in memory: a later call overwrites a gradient
    that was kept beyond zero_grad. Raises TypeError or ValueError for a wrong argument, and
    RuntimeError if gradients are disabled or no parameter requires one.
    """
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise TypeError(f"model must be a gpt2.Model, got {type(model).__name__}")
    return _Step(model)


class _Step:
    """graphed's step. There is one graph for each shape and setting, once for a first gradient and
    once for one that is added to `gradients`, those that all graphs write to."""

    def __init__(self, model: Model):
        self.model = model
        self.gradients: list[Tensor] | None = None
        self.said: set[str] = set()
        every = _parameters_of(list(model.modules()))
        self.parameters, self.identity = [p for p in every if p.requires_grad], _identity(every)
        device = next(model.parameters()).device
        self.replays = Replays(device)
        self.scale, self.scaled_by = torch.ones((), device=device), 1.0

    def __call__(self, idx: Tensor, targets: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be an int64 tensor, got {type(targets).__name__}")
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise RuntimeError("gpt2.graphed computes gradients, but they are disabled here")
        if not any(p.requires_grad for p in self.model.parameters()):
            raise RuntimeError("gpt2.graphed computes gradients, but no parameter requires one")
        self._set_scale(scale)
        modules = list(self.model.modules())  # takes 0.1 ms, so once
        reason = self._why_eager(modules, idx, targets)
        if reason is not None:
            if reason not in self.said:
                warnings.warn(f"gpt2.graphed runs without CUDA graphs: {reason}", stacklevel=2)
            self.said.add(reason)
            return self._run(idx, targets)
        first = self.parameters[0].grad is None
        key = first, self._settings(modules), signature(idx, targets)
        if key in self.replays.graphs:  # a replay checks nothing
            V = self.model.config.vocab_size
            check_ids("idx", idx, V)
            check_ids("targets", torch.where(targets == -100, IGNORED, targets), V, IGNORED)
        loss = self.replays(key, self._first if first else self._run, idx, targets).clone()
        if self.gradients is None and self.replays.graphs.get(key) is not None:
            self.gradients = [p.grad for p in self.parameters]
        if self.gradients is not None:
            self._attach()
        return loss

    def _run(self, idx: Tensor, targets: Tensor) -> Tensor:
        device = next(self.model.parameters()).device.type
        with torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,  # or a replay would use weights that were converted before
        ):
            _, loss = self.model(idx, targets)
        with torch.autocast(device, enabled=False):  # as where backward follows the with block
            loss.backward(self.scale.to(loss.device, loss.dtype))
        return loss.detach()

    def _set_scale(self, scale: float | Tensor) -> None:
        """Writes scale to the tensor that all graphs read."""
        if isinstance(scale, Tensor):
            if scale.numel() != 1 or not scale.is_floating_point():
                got = f"{tuple(scale.shape)} of {scale.dtype}"
                raise ValueError(f"scale must be a number or a floating tensor of one, got {got}")
            self.scale.copy_(scale.detach().view(()))
            self.scaled_by = None  # unknown
            return
        check_number("scale", scale)
        if scale != self.scaled_by:
            self.scale.fill_(scale)
            self.scaled_by = scale

    def _first(self, idx: Tensor, targets: Tensor) -> Tensor:
        """_run, without gradients before. The first capture keeps those that it computes; later
        ones copy theirs."""
        for p in self.parameters:
            p.grad = None
        loss = self._run(idx, targets)
        if self.gradients is not None:
            torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
            self._attach()
        return loss

    def _attach(self) -> None:
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient

    def _settings(self, modules: list[nn.Module]) -> tuple:
        """What the computation depends on, except tensors."""
        device = self.parameters[0].device.type
        return (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            self.model.fast,
            dispatch.forced(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            *((m.training, getattr(m, "dropout", None)) for m in modules),
        )

    def _why_eager(self, modules: list[nn.Module], idx: Tensor, targets: Tensor) -> str | None:
        """A reason against a graph, or None."""
        model = self.model
        if type(model) is not Model:
            return f"the model is a {type(model).__name__}, not a gpt2.Model"
        if not supports(self.replays.device):
            return "the model is not on a CUDA GPU"
        if not self.parameters:
            return "parameters were unfrozen; call gpt2.graphed again"
        if torch.is_anomaly_enabled():
            return "anomaly detection is on"
        if not all(isinstance(x, Tensor) and x.dtype == torch.int64 for x in (idx, targets)):
            return "idx and targets must be int64 tensors"
        if idx.device != self.parameters[0].device or targets.device != idx.device:
            return "idx and targets are not on the model's GPU"
        if any(map(is_hooked, modules)):
            return "a module has hooks or a replaced forward, which a replay would not call"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters):
            return "a parameter has hooks, which a replay would not call"
        if _identity(_parameters_of(modules)) != self.identity:
            return "parameters were replaced, moved or frozen; call gpt2.graphed again"
        gradients = [p.grad for p in self.parameters]
        if all(g is None for g in gradients):
            return None
        if any(g is None for g in gradients):
            return "some parameters have gradients and others have none"
        own = self.gradients
        if own is not None and any(a is not b for a, b in zip(gradients, own, strict=True)):
            return "gradients were replaced by others"
        return None


def _parameters_of(modules: list[nn.Module]) -> list[Tensor]:
    every = (p for m in modules for p in m._parameters.values() if p is not None)
    return list(dict.fromkeys(every))  # a tied one once


def _identity(parameters: list[Tensor]) -> list[tuple]:
    """What a graph relies on: the parameters, their memory, and which have gradients."""
    return [(id(p), p.data_ptr(), p.requires_grad) for p in parameters]
