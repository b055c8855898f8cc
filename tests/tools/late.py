"""A device whose results come late: ids on it are checked asynchronously, on a CPU too.

`late` is a fixture of conftest.py.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from util import DEVICE

from gpt2.kernels import ids, raw_ops

ON_GPU = DEVICE == "cuda"
# Operators that make the host wait for a device.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
}


class Late:
    """The device. Its copies arrive at finish(), and before that where the host waits for one."""

    def __init__(self, monkeypatch):
        self.events, self.waits = [], 0
        event = torch.cuda.Event if ON_GPU else None
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self, event and event()))
        if ON_GPU:
            return
        empty = torch.empty
        monkeypatch.setattr(ids, "is_asynchronous", lambda x: True)
        monkeypatch.setattr(
            torch, "empty", lambda *shape, pin_memory=None, **options: empty(*shape, **options)
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)

    def finish(self) -> None:
        for event in self.events:
            event.finish()


class Event:
    """An event that is not done before finish; on a GPU, around a real one."""

    def __init__(self, device: Late, event: torch.cuda.Event | None):
        self.device, self.event, self.done = device, event, False
        device.events.append(self)

    def record(self, stream=None):
        if self.event is not None:
            self.event.record(stream)

    def finish(self):
        if self.event is not None:
            self.event.synchronize()
        self.done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.device.waits += not self.done
        self.finish()


class Waits(TorchDispatchMode):
    """Lists the operators that would wait for a device, those inside of raw ops included."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: list[str] = []
        launch = raw_ops.on_device_of

        def seen(x, function, *args, **kwargs):
            with self:
                return launch(x, function, *args, **kwargs)

        monkeypatch.setattr(raw_ops, "on_device_of", seen)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITING:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def refused(message: str):
    """pytest.raises for an id outside its range. A GPU reports it where the host waits."""
    with pytest.raises(ValueError, match=message):
        yield
        ids.raise_pending(torch.device(DEVICE), wait=True)
