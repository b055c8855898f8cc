"""AdamW in the form used for GPT-2, and the learning rate of every step."""

import math

import torch
from torch import Tensor, nn

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which PyTorch updates all tensors in one kernel


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    capturable: bool = False,
) -> torch.optim.AdamW:
    """AdamW over the parameters of model, fused if the device supports it.

    Weight decay applies to matrices and embeddings, not to biases and norms (one dimension). A
    tied weight is one parameter, so it is updated once. With capturable, a CUDA graph can hold a
    step: the learning rate is then a tensor on the device, which set_learning_rate fills.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = {p.device.type for p in parameters} <= set(_FUSED)
    rate = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device) if capturable else lr
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused, capturable=capturable)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(step: int, *, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly to lr at the end of the warm-up, falls along half a cosine to min_lr at the
    last step, and then stays at min_lr.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
