"""Global memory is the host's: kernels get real pointers to live numpy and torch buffers.

One flat numpy array per element size covers the whole address space, so that a gather over any
buffers is a single index operation. Addresses are first checked against the list of allocations.
Unwritten memory holds the canary, a signalling NaN in every 16-bit format and in float32, which no
computation produces: a load that returns it is a finding.
"""

import bisect
import contextlib

import numpy as np

from .registers import UNSIGNED

CANARY = 0x7FA5  # in every 16-bit half of fresh memory
_CANARIES = {
    size: UNSIGNED[size](int.from_bytes(CANARY.to_bytes(2, "little") * (size // 2), "little"))
    for size in (2, 4, 8)
}
_ORIGIN = 4096  # numpy refuses an array at address 0


class _AddressSpace:
    def __init__(self, size):
        self.__array_interface__ = {
            "version": 3, "typestr": f"<u{size}",
            "data": (_ORIGIN, False), "shape": ((1 << 47) // size,),
        }  # fmt: skip


FLAT = {size: np.asarray(_AddressSpace(size)) for size in (1, 2, 4, 8)}


def poison(array: np.ndarray) -> np.ndarray:
    """Fills memory that is about to be allocated."""
    raw = array.reshape(-1).view(np.uint8)
    raw[: raw.size // 2 * 2].view(np.uint16)[:] = CANARY
    return array


class Memory:
    """The allocations that a launch may access, as (address, bytes)."""

    def __init__(self, allocations=()):
        self.allocations: dict[int, int] = dict(allocations)
        self._sorted = None

    @classmethod
    def of(cls, *arrays) -> "Memory":
        """The whole storage of each numpy array and torch tensor."""
        memory = cls()
        for x in arrays:
            if hasattr(x, "untyped_storage"):
                memory.add(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
            else:
                memory.add(x.ctypes.data, x.nbytes)
        return memory

    def add(self, address: int, nbytes: int):
        if nbytes:
            self.allocations[address] = max(nbytes, self.allocations.get(address, 0))
            self._sorted = None

    def remove(self, address: int):
        self.allocations.pop(address, None)
        self._sorted = None

    @contextlib.contextmanager
    def also(self, allocations):
        """Adds a module's own variables for the duration of a launch."""
        before = dict(self.allocations)
        for address, nbytes in allocations:
            self.add(address, nbytes)
        self._index()
        try:
            yield
        finally:
            self.allocations, self._sorted = before, None

    def _index(self):
        self._sorted = sorted(self.allocations)
        self.starts = np.array(self._sorted, np.int64)
        self.ends = np.array([a + self.allocations[a] for a in self._sorted], np.int64)

    def outside(self, addresses, nbytes):
        """A mask of the accesses that leave their allocation, or None."""
        if self._sorted is None:
            self._index()
        if not addresses.size:
            return None
        low, high = int(addresses.min()), int(addresses.max())
        i = bisect.bisect_right(self._sorted, low) - 1
        if i >= 0 and high + nbytes <= self.ends[i]:
            return None
        if not self._sorted:
            return np.ones(addresses.size, np.bool_)
        i = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (i < 0) | (addresses > self.ends[i] - nbytes)
        return bad if bad.any() else None

    def describe(self, address, nbytes):
        """Describes the place of an access outside of all allocations."""
        if not self._sorted:
            return f"{nbytes} bytes at {address:#x}, but the launch has no memory"

        def distance(start):
            return max(start - address, address + nbytes - start - self.allocations[start], 0)

        start = min(self._sorted, key=distance)
        return (
            f"{nbytes} bytes at byte {address - start} of an allocation of "
            f"{self.allocations[start]} bytes"
        )

    # Access: addresses are int64, one per thread; values (threads, count) unsigned words of `size`

    def check(self, m, ins, action, addresses, nbytes, t):
        misaligned = addresses & (nbytes - 1)
        if misaligned.any():
            bad = misaligned != 0
            what = f"{action} of {nbytes} bytes at {int(addresses[bad][0]):#x}: misaligned"
            raise m.fault(ins, "alignment", what, m.ids[t][bad])
        bad = self.outside(addresses, nbytes)
        if bad is not None:
            what = f"{action} of {self.describe(int(addresses[bad][0]), nbytes)}"
            raise m.fault(ins, "bounds", what, m.ids[t][bad])

    def check_copy(self, m, ins, addresses, counts, size, t):
        """Checks the source of asynchronous copies of `counts` bytes, at most `size`."""
        for count in np.unique(counts):
            here = counts == count
            if not count:
                continue
            if (addresses[here] % size).any():
                raise m.fault(
                    ins, "alignment", f"a source not aligned to {size} bytes", m.ids[t][here]
                )
            bad = self.outside(addresses[here], int(count))
            if bad is not None:
                what = f"copies from {self.describe(int(addresses[here][bad][0]), int(count))}"
                raise m.fault(ins, "bounds", what, m.ids[t][here][bad])

    def check_canary(self, m, ins, values, counts, t):
        """Checks loaded bytes (values): a whole word of the canary is unwritten memory."""
        fresh = (values.view(np.uint32) == _CANARIES[4]).any(1) & (counts > 0)
        if fresh.any():
            what = "copies global memory that nobody has written"
            raise m.fault(ins, "uninitialized", what, m.ids[t][fresh])

    def load(self, m, ins, addresses, size, count, t):
        self.check(m, ins, "load", addresses, size * count, t)
        values = FLAT[size][elements(addresses, size, count)]
        m.counts.global_bytes_read += values.nbytes
        if size > 1 and m.launch.canary:
            fresh = values == _CANARIES[size]
            if fresh.any():
                what = "loads from global memory that nobody has written"
                raise m.fault(ins, "uninitialized", what, m.ids[t][fresh.any(1)])
        return values

    def store(self, m, ins, addresses, values, t):
        size, count = values.dtype.itemsize, values.shape[1]
        self.check(m, ins, "store", addresses, size * count, t)
        FLAT[size][elements(addresses, size, count)] = values
        m.counts.global_bytes_written += values.nbytes


def elements(addresses, size, count=1):
    """Indices into FLAT[size]."""
    first = (addresses - _ORIGIN) // size
    return first[:, None] if count == 1 else first[:, None] + np.arange(count)


class Params:
    """The launch's parameters as memory: all threads read the same bytes."""

    def load(self, m, ins, addresses, size, count, t):
        if ((addresses < 0) | (addresses + size * count > m.params.size)).any():
            raise m.fault(ins, "bounds", "loads past the kernel's parameters", m.ids[t])
        index = addresses[:, None] + np.arange(size * count)
        return m.params[index].view(UNSIGNED[size])

    def store(self, m, ins, addresses, values, t):
        raise m.fault(ins, "bounds", "stores into the kernel's parameters", m.ids[t])


class Local:
    """Each thread's local bytes, and which of them it has written."""

    def __init__(self, nbytes, n):
        self.nbytes = nbytes
        self.row = -(-nbytes // 16) * 16
        self.data = np.zeros((n, self.row), np.uint8)
        self.written = np.zeros((n, self.row), np.bool_)

    def _index(self, m, ins, action, addresses, nbytes, t):
        for kind, bad, why in (
            ("alignment", addresses % nbytes != 0, "misaligned"),
            ("bounds", (addresses < 0) | (addresses + nbytes > self.nbytes), "outside"),
        ):
            if bad.any():
                where = f"byte {int(addresses[bad][0])} of {self.nbytes} bytes of local memory"
                raise m.fault(
                    ins, kind, f"{action} of {nbytes} bytes at {where}: {why}", m.ids[t][bad]
                )
        return m.ids[t][:, None], addresses[:, None] + np.arange(nbytes)

    def load(self, m, ins, addresses, size, count, t):
        index = self._index(m, ins, "load", addresses, size * count, t)
        unset = ~self.written[index].all(1)
        if unset.any():
            what = "loads from local memory that the thread has not written"
            raise m.fault(ins, "uninitialized", what, m.ids[t][unset])
        return self.data[index].view(UNSIGNED[size])

    def store(self, m, ins, addresses, values, t):
        raw = np.ascontiguousarray(values).view(np.uint8)
        index = self._index(m, ins, "store", addresses, raw.shape[1], t)
        self.data[index], self.written[index] = raw, True
