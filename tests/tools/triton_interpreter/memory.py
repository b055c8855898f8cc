"""The memory that a launch may access, and which of its programs accessed what."""

import bisect

import numpy as np
from triton.runtime.errors import InterpreterError

MAX_WATCHED = 2**24  # elements; larger storages are not checked for races


class KernelFault(InterpreterError):
    """A kernel did something that is an error, or undefined, on a GPU."""


class Region:
    """One storage of a launch: its address, and the program that wrote and read each element."""

    def __init__(self, start):
        self.start = self.end = start
        self.itemsize = 8
        self.names = []
        # Per element: 0 for none, p for program p, -1 for several; allocated at the first store
        self.writer = self.reader = None

    def __repr__(self):
        return f"{'/'.join(self.names)} ({self.end - self.start} bytes)"

    def add(self, name, tensor):
        self.names.append(name)
        self.end = max(self.end, self.start + tensor.untyped_storage().nbytes())
        self.itemsize = min(self.itemsize, tensor.element_size())

    def distance(self, address, itemsize):
        """The number of bytes of this access outside the storage, or its distance from it."""
        return max(self.start - address, address + itemsize - self.end, 0)

    def store(self, addresses, program):
        """Marks the elements as written; returns the addresses that other programs touched."""
        if self.writer is None:
            count = -(-(self.end - self.start) // self.itemsize)
            if count > MAX_WATCHED:
                return ()
            self.writer, self.reader = np.zeros(count, np.int32), np.zeros(count, np.int32)
        index = self._elements(addresses)
        shared = _others(self.writer[index], program) | _others(self.reader[index], program)
        self.writer[index] = program
        return addresses[shared] if shared.any() else ()

    def load(self, addresses, program):
        """Marks the elements as read; returns the addresses that another program wrote.

        Reads before the first store are not marked, so that pure inputs cost nothing.
        """
        if self.writer is None:
            return ()
        index = self._elements(addresses)
        self.reader[index] = np.where(_others(self.reader[index], program), -1, program)
        shared = _others(self.writer[index], program)
        return addresses[shared] if shared.any() else ()

    def _elements(self, addresses):
        return (addresses - np.uint64(self.start)).view(np.int64) // self.itemsize


def _others(owner, program):
    return (owner != 0) & (owner != program)


class Launch:
    """One launch of a kernel: its storages, and the running program."""

    def __init__(self, kernel, tensors, races):
        self.kernel, self.races = kernel, races
        self.program, self.grid_idx = 0, (0, 0, 0)
        regions = {}
        for name, tensor in tensors:
            start = tensor.untyped_storage().data_ptr()
            if start:  # 0: the storage has no elements
                regions.setdefault(start, Region(start)).add(name, tensor)
        self.regions = [regions[start] for start in sorted(regions)]
        self.starts = [region.start for region in self.regions]

    def fault(self, what):
        return KernelFault(f"{self.kernel}, program {self.grid_idx}: {what}")

    def check(self, action, pointers, mask, itemsize):
        """Raises unless every active lane is inside a storage, and in no other program's share of
        it."""
        active = pointers if mask is None or mask.all() else pointers[mask]
        if not active.size:
            return
        low, high = int(active.min()), int(active.max())
        i = bisect.bisect_right(self.starts, low) - 1
        if i >= 0 and high + itemsize <= self.regions[i].end:
            self._check_race(action, self.regions[i], active)
        else:  # several storages, or a stray lane
            for address in active.ravel():
                self._check_address(action, int(address), itemsize)
            owner = np.searchsorted(self.starts, active, side="right") - 1
            for i in np.unique(owner):
                self._check_race(action, self.regions[i], active[owner == i])

    def _check_address(self, action, address, itemsize):
        if not self.regions:
            raise self.fault(f"{action} at {address:#x}, but no argument is a tensor with elements")
        nearest = min(self.regions, key=lambda region: region.distance(address, itemsize))
        if nearest.distance(address, itemsize):
            offset = address - nearest.start
            raise self.fault(f"{action} of {itemsize} bytes at byte {offset} of {nearest}")

    def _check_race(self, action, region, addresses):
        if not self.races or action == "atomic":
            return
        shared = (region.store if action == "store" else region.load)(addresses, self.program)
        if len(shared):
            raise self.fault(
                f"{action} at byte {int(shared.flat[0]) - region.start} of {region}, which another "
                "program of this launch touches too: on a GPU they run in no order"
            )
