"""What the device computes in a run: gradients, updates and validation losses.

On a GPU each is replayed as a CUDA graph from its second call on (graphs.py), with the bits of an
eager call. Gradients and update are two graphs, because the host decides between them: it stops if
the loss or the norm of the gradient is not finite.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import graphs
from ..kernels.checks import check_ids
from ..model import IGNORED, Model
from . import optim
from .config import TrainConfig


class Work:
    """A model and its optimizer on a device."""

    def __init__(
        self, model: Model, options: TrainConfig, device: torch.device, dtype: torch.dtype
    ):
        self.model, self.options, self.device, self.dtype = model, options, device, dtype
        self.forward = torch.compile(model) if options.compile else model
        self.optimizer = optim.adamw(
            model,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            capturable=graphs.supports(device),  # also without graphs: the same bits
        )
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Must be called after the optimizer's state has been loaded, which replaces tensors."""
        self.replays = graphs.Replays(self.device)

    def batch(self, x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the device. Raises ValueError, naming a value, if an id lies
        outside the vocabulary: here a check needs no wait, and replays check nothing."""
        inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
        check_ids("idx", inputs, self.model.config.vocab_size)
        check_ids("targets", targets, self.model.config.vocab_size, IGNORED)
        return self._to_device(inputs), self._to_device(targets)

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the gradients of the mean loss over the targets y (B, T), and clips them.
        Returns that loss and the norm of the gradient before, (2,). B is that of the options."""
        o = self.options
        if x.shape != (o.batch_size * o.grad_accum, o.block_size):
            # Gradients of another shape would replace those that the captured update reads.
            raise ValueError(f"x must be one batch of the options, got {tuple(x.shape)}")
        if o.compile:
            return self._gradients(x, y)
        return self._call(self._gradients, x, y)

    def update(self, lr: float) -> None:
        """Updates the weights with this learning rate."""
        optim.set_learning_rate(self.optimizer, lr)
        if self._has_static_gradients():
            self._call(self._update)
        else:  # a captured update would read them at the next step, when they are elsewhere
            self._update()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss over the targets y (B, T), ()."""
        return self._call(self._loss, x, y)

    def loss_of(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a model over the targets y (B, T), ()."""
        with self._autocast():
            return model(x, y, return_logits=False)[1]

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the gradient of the mean loss over the targets y (B, T), and returns that loss.

        The B windows go through the model batch_size at a time. Each part is weighted by its
        number of targets, so splitting changes the memory use but not the result.
        """
        total = torch.zeros((), device=self.device)
        targets = (y != IGNORED).sum()
        for x_part, y_part in zip(
            x.split(self.options.batch_size), y.split(self.options.batch_size), strict=True
        ):
            with self._autocast():
                _, loss = self.forward(x_part, y_part)
            loss = loss * ((y_part != IGNORED).sum() / targets)
            loss.backward()
            total += loss.detach()
        return total

    def _gradients(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)  # a capture leaves those that its replays write
        loss = self.backward(x, y)
        limit = self.options.grad_clip or math.inf
        return torch.stack([loss, torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)])

    def _update(self) -> None:
        self.optimizer.step()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_of(self.model, x, y)

    def _has_static_gradients(self) -> bool:
        """Whether the gradients are those that a graph writes to."""
        held = self.replays.graphs.items()
        return any(key[0] == "_gradients" and graph is not None for key, graph in held)

    def _call(self, function: Callable, *inputs: Tensor):
        if not self.options.cuda_graph or not graphs.supports(self.device):
            return function(*inputs)
        key = function.__name__, self.model.training, graphs.signature(*inputs)
        return self.replays(key, function, *inputs)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)  # without waiting for the device

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )
