"""Threads, divergence, barriers.

The threads of all blocks of a chunk are one array, warp by warp. Each has a PC. The threads at the
lowest PC execute a run (flow.py) together, whatever their block, until they reach or pass a PC
where others wait. So threads that diverged at a branch reconverge where its arms join, and a whole
launch shares numpy's cost per instruction.

A thread at a barrier waits for its block; a warp-wide instruction waits for the lanes that it
names. If no thread can run, that is a finding.
"""

import numpy as np

from .findings import Finding, Findings
from .memory import Local
from .shared import Shared
from .tensor import Copies

RUNNING, AT_BARRIER, HELD, EXITED = range(4)
MAX_STEPS = 5_000_000  # runs of instructions per chunk of blocks
END = 2**31 - 1  # a PC after every other


class Machine:
    """A chunk of a launch's blocks. Attributes that instructions use: R[slot], ids, counts."""

    def __init__(self, launch, program, blocks, executed):
        self.launch, self.program, self.counts = launch, program, launch.counts
        self.kernel, self.memory, self.params = launch.kernel, launch.memory, launch.params
        self.executed = executed
        threads = int(np.prod(launch.block))
        self.per_block = -(-threads // 32) * 32
        self.blocks = len(blocks)
        self.n = n = self.blocks * self.per_block
        self.ids = np.arange(n)
        self.in_block = self.ids % self.per_block
        self.block_of = self.ids // self.per_block
        self.block_numbers = blocks
        self.state = np.where(self.in_block < threads, RUNNING, EXITED).astype(np.uint8)
        self.everyone = threads == self.per_block  # no thread has exited
        self.pc = np.zeros(n, np.int64)
        self.moved = False
        self.set = np.zeros((len(program.watched), n), np.bool_)
        self.R = program.slots.allocate(n)
        self._special_registers()
        self.shared = Shared(self, launch.shared_bytes, program.grain)
        self.local = Local(program.local_bytes, n)
        self.barrier_id = np.zeros(n, np.int64)
        self.on_release = {}  # PC -> function of bar.red when its block has arrived
        self.copies = Copies(n)

    def _special_registers(self):
        block, grid = self.launch.block, self.launch.grid
        values = {}
        for axis, inside, outside, sizes in zip(
            "xyz", _unravel(self.in_block, block), _unravel(self.block_numbers, grid),
            zip(block, grid, strict=True), strict=True,
        ):  # fmt: skip
            values[f"%tid.{axis}"], values[f"%ctaid.{axis}"] = inside, outside[self.block_of]
            values[f"%ntid.{axis}"], values[f"%nctaid.{axis}"] = sizes
        lane = self.ids & 31
        equal = np.left_shift(np.uint32(1), lane.astype(np.uint32))
        less = equal - np.uint32(1)
        values |= {
            "%laneid": lane, "%warpid": self.in_block >> 5, "%nwarpid": self.per_block >> 5,
            "%lanemask_eq": equal, "%lanemask_lt": less, "%lanemask_le": less | equal,
            "%lanemask_ge": ~less, "%lanemask_gt": ~(less | equal),
            "%dynamic_smem_size": self.launch.shared_bytes - self.program.dynamic_start,
            "%total_smem_size": self.launch.shared_bytes,
        }  # fmt: skip
        for (name, *_), slot in self.program.slots.index.items():
            if name in values:
                self.R[slot][:] = values[name]

    def run(self):
        runs, executed, counts = self.program.runs, self.executed, self.counts
        steps = 0
        while (group := self._next_group()) is not None:
            pc, t, limit = group
            threads, warps = self._sizes(t)
            while pc < limit:
                run = runs[pc]
                if run.gather:
                    ready = run.gather(self, t)
                    if ready is not t:
                        if ready is None:
                            break
                        t = ready
                        threads, warps = self._sizes(t)
                self.moved = True
                steps += 1
                if steps > MAX_STEPS:
                    ins = self.kernel.instructions[run.start]
                    raise self.fault(ins, "hang", f"runs on after {MAX_STEPS} steps", self.ids[t])
                executed[run.start : run.stop] |= run.always
                for op in run.ops:
                    op(self, t)
                counts.thread_instructions += threads * (run.stop - run.start)
                counts.warp_instructions += warps * (run.stop - run.start)
                if run.end is None:
                    pc = run.stop
                else:
                    pc = run.end(self, t)
                    if pc is None:
                        break
            else:
                self.pc[t] = pc

    def _next_group(self):
        """The lowest PC of threads that can run, those threads, and the next higher PC of a
        thread."""
        state = self.state
        runnable = np.flatnonzero(state == RUNNING)
        if not runnable.size:
            held = state == HELD
            if held.any() and self.moved:
                state[held], self.moved = RUNNING, False
                return self._next_group()
            self._check_finished()
            return None
        pcs = self.pc[runnable]
        low = int(pcs.min())
        here = pcs == low
        if here.all():
            ids, limit = runnable, END
        else:
            ids, limit = runnable[here], int(pcs[~here].min())
        held = state == HELD
        if held.any():
            join = held & (self.pc == low)
            if join.any():
                state[join] = RUNNING
                ids = np.sort(np.concatenate([ids, np.flatnonzero(join)]))
            others = self.pc[held & ~join]
            later = others[others > low]
            limit = min(limit, int(later.min())) if later.size else limit
        first, last = int(ids[0]), int(ids[-1])
        return low, (slice(first, last + 1) if last - first + 1 == ids.size else ids), limit

    def _sizes(self, t):
        ids = self.ids[t]
        if isinstance(t, slice):
            return ids.size, (int(ids[-1]) >> 5) - (int(ids[0]) >> 5) + 1
        return ids.size, np.unique(ids >> 5).size

    # Divergence

    def branch(self, t, taken, target, following):
        """The PC where all of t continue, or None if they diverge."""
        if taken.all():
            return target
        if not taken.any():
            return following
        self.pc[t] = np.where(taken, target, following)
        return None

    def exit(self, t):
        self.state[t] = EXITED
        self.everyone = False
        self.moved = True
        self._release()

    def exited(self, threads):
        return self.state[threads] == EXITED

    def gather(self, ins, t, members=None):
        """The threads of t whose warp is complete; the others wait. members: the lanes that an
        instruction names. None: the whole warp, which then must not have lost a lane."""
        ids = self.ids[t]
        if ids.size % 32 == 0:  # whole warps? ids are sorted, so each is a run of 32
            first = ids[::32]
            if not (first & 31).any() and (ids[31::32] - first == 31).all():
                return t
        present = self.lanes(np.isin(self.ids, ids, assume_unique=True))[ids >> 5]
        wanted = np.uint32(0xFFFFFFFF)
        if members is not None:
            wanted = members & self.lanes(self.state != EXITED)[ids >> 5]
        complete = (present & wanted) == wanted
        if complete.all():
            return t
        wait, ready = ids[~complete], ids[complete]
        self.state[wait], self.pc[wait] = HELD, ins.pc
        return ready if ready.size else None

    def lanes(self, flags):
        """A 32-bit mask per warp."""
        return np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0]

    # Barriers

    def barrier(self, t, ins, number, count=None):
        """Waits for the block; if all of t's blocks are complete, they continue at once."""
        ids = self.ids[t]
        if count is not None and (count != self.per_block).any():
            raise self.fault(ins, "barrier", "waits for a part of its block: not supported", ids)
        if self.everyone and ids.size == self.n and (number[0] == number).all():
            self.counts.barriers += self.blocks
            self.shared.block_barrier(t)
            return ins.pc + 1
        self.state[t], self.pc[t], self.barrier_id[t] = AT_BARRIER, ins.pc, number
        self._release()
        return None

    def _release(self):
        state = self.state.reshape(self.blocks, -1)
        waiting = state == AT_BARRIER
        if not waiting.any():
            return
        done = (waiting | (state == EXITED)).all(1) & waiting.any(1)
        if not done.any():
            return
        threads = int(np.prod(self.launch.block))
        ids = np.flatnonzero(np.repeat(done, self.per_block) & (self.in_block < threads))
        self._check_barrier(ids)
        for pc, then in self.on_release.items():
            then(self, ids[self.pc[ids] == pc])
        self.counts.barriers += int(done.sum())
        self.shared.block_barrier(ids)
        self.state[ids] = RUNNING
        self.pc[ids] += 1

    def _check_barrier(self, ids):
        """Checks that all threads at a barrier are at the same one, and each warp at one
        instruction."""
        gone = ids[self.state[ids] == EXITED]
        if gone.size:
            same = self.block_of[ids] == self.block_of[gone[0]]
            mates = ids[same & (self.state[ids] != EXITED)]
            ins = self.kernel.instructions[int(self.pc[mates[0]])]
            what = f"{gone.size} threads of the block have exited, others wait at this barrier"
            raise self.fault(ins, "barrier", what, mates)
        pcs, numbers = self.pc[ids], self.barrier_id[ids]
        of_warp, of_block = ids >> 5, self.block_of[ids]
        for group, value, what in (
            (of_warp, pcs, "the threads of a warp wait at different barrier instructions"),
            (of_block, numbers, "the threads of a block wait at barriers of different numbers"),
        ):
            first = value[np.searchsorted(group, group)]
            if (odd := value != first).any():
                ins = self.kernel.instructions[int(pcs[odd][0])]
                other = self.kernel.instructions[int(pcs[np.searchsorted(group, group)][odd][0])]
                raise self.fault(ins, "barrier", f"{what}, others at line {other.line}", ids[odd])

    def _check_finished(self):
        stuck = np.flatnonzero(self.state != EXITED)
        if stuck.size:
            ins = self.kernel.instructions[int(self.pc[stuck[0]])]
            held = self.state[stuck[0]] == HELD
            what = (
                "waits for lanes of its warp that never come here" if held
                else "waits for threads of its block that never come to a barrier"
            )  # fmt: skip
            raise self.fault(ins, "barrier", what, stuck[self.pc[stuck] == self.pc[stuck[0]]])

    # Faults

    def fault(self, ins, kind, what, threads):
        """A Findings error for an instruction and these threads; it names the first."""
        threads = np.atleast_1d(threads)
        first = int(threads[0])
        block = _unravel(self.block_numbers[self.block_of[first]], self.launch.grid)
        inside = _unravel(self.in_block[first], self.launch.block)
        return Findings([
            Finding(
                kind, what, self.kernel.name, ins.line, ins.text, ins.source,
                tuple(map(int, block)), tuple(map(int, inside)), int(np.unique(threads).size),
            )
        ])  # fmt: skip


def _unravel(index, sizes):
    x, y, _ = sizes
    return index % x, index // x % y, index // (x * y)
