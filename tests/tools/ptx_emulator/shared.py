"""Shared memory, and the record of accesses since the last barrier.

Every grain (as wide as the kernel's narrowest shared access) has two stamps, of its last write and
of its reads:

    block barriers passed | warp barriers passed | flags | thread in block
          bits 40–63            bits 20–39         10–19        0–9

A stamp of another thread with the present number of block barriers is an access that nothing has
ordered before this one: a race, if either is a write. Within a warp, bar.warp.sync also orders
accesses; shfl, mma and similar instructions do not. A write stamp of zero means that the memory is
unwritten.

An asynchronous copy counts as a write at any time from its issue until its own thread waits for it.
Until then its grains are pending: accessing them is a finding.
"""

import numpy as np

from .registers import UNSIGNED

BLOCK_SHIFT, WARP_SHIFT = 40, 20
THREAD = (1 << 10) - 1
LANES, WARPS, ATOMIC, PRESENT = 1 << 10, 1 << 11, 1 << 12, 1 << 13
WHO = THREAD | LANES | WARPS
SAME_WARP = THREAD & ~31 | WARPS


class Shared:
    def __init__(self, m, nbytes, grain):
        self.m, self.nbytes, self.grain = m, nbytes, grain
        self.size = -(-nbytes // 128) * 128  # from one block's memory to the next
        self.data = np.zeros(self.size * m.blocks, np.uint8)
        self.views = {size: self.data.view(UNSIGNED[size]) for size in (1, 2, 4, 8)}
        grains = self.data.size // grain
        self.writes = np.zeros(grains, np.int64)
        self.reads = np.zeros(grains, np.int64)
        self.pending = np.zeros(grains, np.int16)
        self.copies = 0  # asynchronous ones in flight
        self.base = m.block_of * self.size
        self.now = m.in_block + (PRESENT + (1 << BLOCK_SHIFT))  # each thread's stamp

    def block_barrier(self, t):
        self.now[t] += 1 << BLOCK_SHIFT

    def warp_barrier(self, t):
        self.now[t] += 1 << WARP_SHIFT

    # The rules

    def check(self, m, ins, action, addresses, nbytes, t):
        """Checks bounds and alignment; returns the grains, (threads, n)."""
        ends = addresses + nbytes
        if (addresses & (nbytes - 1)).any():
            bad = addresses % nbytes != 0
            where = f"shared address {int(addresses[bad][0])}"
            what = f"{action} of {nbytes} bytes at {where}: misaligned"
            raise m.fault(ins, "alignment", what, m.ids[t][bad])
        if addresses.size and (int(addresses.min()) < 0 or int(ends.max()) > self.nbytes):
            bad = (addresses < 0) | (ends > self.nbytes)
            where = f"byte {int(addresses[bad][0])} of {self.nbytes} shared bytes"
            what = f"{action} of {nbytes} bytes at {where}"
            raise m.fault(ins, "bounds", what, m.ids[t][bad])
        first = (addresses + self.base[t]) // self.grain
        width = max(nbytes // self.grain, 1)
        return first[:, None] if width == 1 else first[:, None] + np.arange(width)

    def _race(self, m, ins, action, before, prior, now, grains, t):
        """Raises if a prior stamp is of an access without a barrier between it and this one."""
        racy = (prior >= (now >> BLOCK_SHIFT << BLOCK_SHIFT)) & ((prior ^ now) & WHO != 0)
        if not racy.any():
            return
        ordered = ((prior ^ now) & SAME_WARP == 0) & ((prior >> WARP_SHIFT) < (now >> WARP_SHIFT))
        atomics = (prior & now & ATOMIC) != 0
        racy &= ~(ordered | atomics)
        if racy.any():
            row, column = np.argwhere(racy)[0]
            stamp = int(prior[row, column])
            who = "several threads" if stamp & (LANES | WARPS) else f"thread {stamp & THREAD}"
            byte = int(grains[row, column]) * self.grain - int(self.base[t][row])
            what = (
                f"{action} shared byte {byte}, which {who} of the block {before} "
                "with no barrier in between"
            )
            raise m.fault(ins, "race", what, m.ids[t][racy.any(1)])

    def _not_pending(self, m, ins, action, grains, t):
        if not self.copies:
            return
        pending = self.pending[grains] != 0
        if pending.any():
            row, column = np.argwhere(pending)[0]
            byte = int(grains[row, column]) * self.grain - int(self.base[t][row])
            what = f"{action} shared byte {byte}, which a cp.async is still to write"
            raise m.fault(ins, "async", what, m.ids[t][pending.any(1)])

    def note_read(self, m, ins, grains, t, flags=0):
        """Records a read. flags: LANES if the whole warp reads what one lane addresses."""
        now = (self.now[t] | flags)[:, None]
        written = self.writes[grains]
        self._not_pending(m, ins, "reads", grains, t)
        if not written.all():
            row, column = np.argwhere(written == 0)[0]
            byte = int(grains[row, column]) * self.grain - int(self.base[t][row])
            what = f"reads shared byte {byte}, which nobody has written"
            raise m.fault(ins, "uninitialized", what, m.ids[t][(written == 0).any(1)])
        self._race(m, ins, "reads", "wrote", written, now, grains, t)
        # Readers since the last barrier: one thread, several lanes of a warp, or several warps
        prior, stamp = self.reads[grains], np.broadcast_to(now, grains.shape)
        recent = prior >= (now >> BLOCK_SHIFT << BLOCK_SHIFT)
        if recent.any():
            other = recent & ((prior ^ now) & WHO != 0)
            lanes = other & ((prior ^ now) & SAME_WARP == 0)
            current = lanes & ((prior >> WARP_SHIFT) == (now >> WARP_SHIFT))
            stamp = stamp | current * LANES | (other & ~lanes) * WARPS
        self.reads[grains] = stamp
        left = self.reads[grains]
        lost = (left ^ stamp) & WHO != 0
        if lost.any():
            flags = np.where((left ^ stamp) & SAME_WARP == 0, LANES, WARPS)
            np.bitwise_or.at(self.reads, grains[lost], flags[lost])

    def note_write(self, m, ins, grains, t, flags=0, stamp=True):
        now = (self.now[t] | flags)[:, None]
        self._not_pending(m, ins, "writes", grains, t)
        self._race(m, ins, "writes", "wrote", self.writes[grains], now, grains, t)
        self._race(m, ins, "writes", "read", self.reads[grains], now, grains, t)
        if stamp:
            self.writes[grains] = now

    def same_values(self, m, ins, index, values, grains, t):
        """Checks that threads that write one place in one instruction write the same value."""
        if (self.writes[grains] != self.now[t][:, None]).any():
            differ = self.views[values.dtype.itemsize][index] != values
            if differ.any():
                what = "writes shared memory where another thread writes another value at once"
                raise m.fault(ins, "race", what, m.ids[t][differ.any(1)])

    # Access: addresses are int64 offsets, one per thread; values (threads, count) unsigned words

    def index(self, addresses, size, count, t):
        first = (addresses + self.base[t]) // size
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    def load(self, m, ins, addresses, size, count, t):
        grains = self.check(m, ins, "load", addresses, size * count, t)
        self.note_read(m, ins, grains, t)
        if m.launch.banks:
            self.count_conflicts(addresses, size * count, t)
        return self.views[size][self.index(addresses, size, count, t)]

    def store(self, m, ins, addresses, values, t):
        size, count = values.dtype.itemsize, values.shape[1]
        grains = self.check(m, ins, "store", addresses, size * count, t)
        self.note_write(m, ins, grains, t)
        if m.launch.banks:
            self.count_conflicts(addresses, size * count, t)
        index = self.index(addresses, size, count, t)
        self.views[size][index] = values
        self.same_values(m, ins, index, values, grains, t)

    def count_conflicts(self, addresses, nbytes, t):
        """Counts wavefronts beyond the minimum. A warp accesses 128 bytes per phase; a phase takes
        as many wavefronts as the largest number of different words in one of the 32 banks."""
        lanes = 32 // max(nbytes // 4, 1)  # of a phase
        words = (addresses // 4)[:, None] + np.arange(max(nbytes // 4, 1))
        phase = np.broadcast_to((self.m.ids[t] // lanes)[:, None], words.shape)
        distinct = np.unique(phase.ravel() << 32 | words.ravel())
        phases, banks = distinct >> 32, distinct & 31
        slot, start = np.unique(phases, return_inverse=True)
        per_bank = np.bincount(start * 32 + banks, minlength=32 * slot.size).reshape(-1, 32)
        self.m.counts.bank_conflicts += int((per_bank.max(1) - 1).sum())

    def atomic(self, m, ins, addresses, size, t):
        """The elements of an atomic access, which races only with plain accesses."""
        grains = self.check(m, ins, "atomic access", addresses, size, t)
        self.note_read(m, ins, grains, t, ATOMIC)
        self.note_write(m, ins, grains, t, ATOMIC)
        return self.views[size], self.index(addresses, size, 1, t)[:, 0]
