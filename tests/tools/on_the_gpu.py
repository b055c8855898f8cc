"""Tensors that claim to be on a GPU."""

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)


class OnTheGpu(TorchFunctionMode):
    """A mode in which tensors claim to be on the GPU but are allocated on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return GPU
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to:
            args = [on_the_cpu(x) for x in args]
        if "device" in kwargs:
            kwargs["device"] = on_the_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def on_the_cpu(x):
    is_device = isinstance(x, (str, torch.device))
    return torch.device("cpu") if is_device and torch.device(x).type == "cuda" else x
