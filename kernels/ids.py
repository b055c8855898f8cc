"""Checks of token ids and lengths that never wait for the device they are on.

Ids on a CPU are checked at once. To read an id from a GPU, the host must wait until the GPU has
done all earlier work. So the smallest and the largest id are copied to pinned memory
asynchronously. The host reads them before the next check, or where it waits anyway
(raise_pending). The error then says which check it was.

Until then no address may depend on an id outside its range, and every result must be NaN: kernels
guard targets and lengths themselves, and guard does it for PyTorch's operators.
"""

import collections
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import recorder as recorders
from .reference import is_transformed

SLOTS = 256  # checks in flight; a GPU's launch queue holds fewer
_lock = threading.Lock()  # activation checkpointing checks from a thread of autograd


def is_asynchronous(x: Tensor) -> bool:
    """Whether the host would have to wait for a value of x."""
    return x.is_cuda


def validate(ids: Tensor, name: str, size: int, ignore_index: int | None = None) -> None:
    """Raises ValueError with the first id outside [0, size) that is not ignore_index.

    On a GPU the error is raised later, see above, but not inside a transform of torch.func, which
    allows no copy into memory that it does not know. Ids without values are not checked: on the
    meta device, inside vmap, and while a CUDA graph is captured, whose replays then give NaN.
    """
    if recorder := recorders.current():
        args = name, size, ignore_index
        recorder.check_ids(validate, ids, _least(ignore_index), size, *args)
        return
    if _has_no_values(ids):
        return
    if is_asynchronous(ids) and not is_transformed():
        with _lock:
            _checks_on(ids.device).add(ids, name, size, ignore_index)
        return
    if not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if _least(ignore_index) <= low.item() and high.item() < size:
        return
    bad = (ids < 0) | (ids >= size)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bad.any():
        raise ValueError(f"{name} must lie in [0, {size}), got {ids[bad][0].item()}")


def raise_pending(device: torch.device, *, wait: bool = False) -> None:
    """Raises the ValueError of an earlier check on device, if its result has arrived. With wait,
    waits for the results of all earlier checks first."""
    if _is_capturing(device):
        return
    with _lock:
        for known, checks in _checks.items():
            if device.type == known.type and device.index in (None, known.index):
                checks.raise_bad(wait)


def guard(ids: Tensor, size: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor | None]:
    """ids clamped to [0, size), and the factor that makes results NaN if that changed an id: a 0-d
    tensor, 1 or NaN. ignore_index stays as it is.

    On a CPU the ids have been checked already; they are returned unchanged, and the factor is None.
    """
    if not is_asynchronous(ids):
        return ids, None
    inside = ids.clamp(0, size - 1)
    if ignore_index is not None:
        inside = torch.where(ids == ignore_index, ids, inside)
    valid = (inside == ids).all()
    return inside, valid / valid  # 0 / 0 is NaN


def poison(x: Tensor, factor: Tensor | None) -> Tensor:
    """x times the factor of guard, in x's dtype. A factor of 1 changes no bit of x or of its
    gradient; NaN makes both NaN."""
    return x if factor is None else x * factor.to(x.dtype)


class _Check(NamedTuple):
    name: str
    number: int  # among the checks of that name
    least: int
    size: int
    slot: int
    copied: torch.cuda.Event


class _Checks:
    """The checks on one device. `waiting` are those whose result the host has not read."""

    def __init__(self, device: torch.device):
        self.device = device
        self.extremes = torch.empty((SLOTS, 2), dtype=torch.int64, pin_memory=True)
        self.counts: collections.Counter = collections.Counter()  # checks so far, by name
        self.waiting: collections.deque[_Check] = collections.deque()
        self.next_slot = 0

    def add(self, ids: Tensor, name: str, size: int, ignore_index: int | None) -> None:
        self.raise_bad()
        self.counts[name] += 1
        if not ids.numel():
            return
        if len(self.waiting) == SLOTS:
            self.waiting[0].copied.synchronize()
            self.raise_bad()
        least = _least(ignore_index)
        if ignore_index is not None and not least <= ignore_index < size:
            ids = ids.masked_fill(ids == ignore_index, 0)
        slot, self.next_slot = self.next_slot, (self.next_slot + 1) % SLOTS
        self.extremes[slot].copy_(torch.stack(torch.aminmax(ids)), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        self.waiting.append(_Check(name, self.counts[name], least, size, slot, copied))

    def raise_bad(self, wait: bool = False) -> None:
        while self.waiting:
            if wait:
                self.waiting[0].copied.synchronize()
            elif not self.waiting[0].copied.query():
                return
            check = self.waiting.popleft()
            low, high = self.extremes[check.slot].tolist()
            if low < check.least or high >= check.size:
                count = self.counts[check.name]
                raise ValueError(
                    f"{check.name} must lie in [0, {check.size}), "
                    f"got {low if low < check.least else high} "
                    f"(check {check.number} of the {count} of {check.name} on {self.device} so far)"
                )


_checks: dict[torch.device, _Checks] = {}


def _checks_on(device: torch.device) -> _Checks:
    if device not in _checks:
        _checks[device] = _Checks(device)
    return _checks[device]


def _least(ignore_index: int | None) -> int:
    """The smallest id that is valid without a mask. The model's ignore_index, -1, is next to 0."""
    return -1 if ignore_index == -1 else 0


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _has_no_values(x: Tensor) -> bool:
    """Whether the values of x cannot be read now: it is a meta or fake tensor or a batch inside
    vmap, or a CUDA graph is being captured."""
    if x.is_meta or isinstance(x, FakeTensor) or _is_capturing(x.device):
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
