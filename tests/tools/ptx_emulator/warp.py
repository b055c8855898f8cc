"""shfl, vote, match and redux: values from other lanes of the warp.

The instruction waits until all lanes that it names have arrived (Machine.gather), so any lane's
register can be read in place. Reading a lane that is not named, or has exited, is a finding,
because PTX leaves the value undefined.
"""

import numpy as np

from .findings import UnsupportedPTX
from .registers import DTYPES, instruction
from .syntax import Immediate, Vector


def gathers(d, operand):
    """Makes the instruction wait for the lanes that it names."""
    ins, slot = d.ins, d.slots.read(operand, "b32")
    every = isinstance(operand, Immediate) and int(operand.text, 0) in (-1, 0xFFFFFFFF)

    def gather(m, t):
        return m.gather(ins, t, None if every and m.everyone else m.R[slot][t])

    d.program.gathers[ins.pc] = gather
    return slot


@instruction("shfl")
def _shfl(d):
    if not d.mods.flag("sync"):
        raise UnsupportedPTX("shfl without .sync")
    how = d.mods.one_of("up", "down", "bfly", "idx")
    d.mods.one_of("b32")
    members = gathers(d, d.operands[4])
    out, *found = _results(d)
    a, b, c = d.read(1, "b32"), d.read(2, "u32"), d.read(3, "u32")
    ins = d.ins

    def source(m, t):
        """(the thread that each one reads, whether it is in the segment)"""
        R, ids = m.R, m.ids[t]
        lane = ids & 31
        by = R[b][t].astype(np.int64) & 31
        clamp = R[c][t].astype(np.int64)
        segment, limit = clamp >> 8 & 31, clamp & 31
        last = (lane & segment) | (limit & ~segment)
        if how == "up":
            other = lane - by
            inside = other >= last
        elif how == "down":
            other = lane + by
            inside = other <= last
        elif how == "bfly":
            other = lane ^ by
            inside = other <= last
        else:
            other = (lane & segment) | (by & ~segment)
            inside = other <= last
        return ids - lane + np.where(inside, other, lane), inside

    def op(m, t):
        R = m.R
        threads, inside = source(m, t)
        named = (R[members][t].astype(np.int64) >> (threads & 31)) & 1
        if not named.all():
            what = "reads a lane that its member mask does not name"
            raise m.fault(ins, "barrier", what, m.ids[t][named == 0])
        if not m.everyone and (gone := m.exited(threads)).any():
            raise m.fault(ins, "barrier", "reads a lane that has exited", m.ids[t][gone])
        R[out][t] = R[a][threads]
        if found:
            R[found[0]][t] = inside

    d.program.moves[ins.pc] = lambda m, t: source(m, t)[0]
    return op


def _results(d):
    """d|p, a value and a predicate, or only d."""
    first = d.operands[0]
    if not isinstance(first, Vector):
        return [d.write("b32")]
    return [d.slots.write(first.items[0], "b32"), d.slots.write(first.items[1], "pred")]


def _per_warp(m, ids, flags):
    """A mask per thread: the lanes of its warp, among ids, with a set flag."""
    every = np.zeros(m.n, np.bool_)
    every[ids] = flags
    return m.lanes(every)[ids >> 5]


@instruction("vote")
def _vote(d):
    if not d.mods.flag("sync"):
        raise UnsupportedPTX("vote without .sync")
    how = d.mods.one_of("all", "any", "uni", "ballot")
    out = d.write(d.mods.one_of("pred", "b32"))
    p, negated = d.read(1, "pred"), d.operands[1].negated
    members = gathers(d, d.operands[2])

    def op(m, t):
        ids, mask = m.ids[t], m.R[members][t]
        ballot = _per_warp(m, ids, m.R[p][t] ^ negated) & mask
        mask = mask & _per_warp(m, ids, True)
        m.R[out][t] = {
            "ballot": ballot, "any": ballot != 0, "all": ballot == mask,
            "uni": (ballot == mask) | (ballot == 0),
        }[how]  # fmt: skip

    return op


@instruction("match")
def _match(d):
    if not d.mods.flag("sync"):
        raise UnsupportedPTX("match without .sync")
    how = d.mods.one_of("any", "all")
    kind = d.mods.one_of("b32", "b64")
    out, *found = _results(d)
    a = d.read(1, kind)
    members = gathers(d, d.operands[2])

    def op(m, t):
        ids, mask = m.ids[t], m.R[members][t]
        lanes = m.R[a][(ids & ~31)[:, None] + np.arange(32)]
        same = np.packbits(lanes == m.R[a][t][:, None], axis=1, bitorder="little").view(np.uint32)[
            :, 0
        ]
        same &= mask & _per_warp(m, ids, True)
        whole = same == (mask & _per_warp(m, ids, True))
        m.R[out][t] = same if how == "any" else np.where(whole, same, np.uint32(0))
        if found:
            m.R[found[0]][t] = whole

    return op


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip


@instruction("redux")
def _redux(d):
    if not d.mods.flag("sync"):
        raise UnsupportedPTX("redux without .sync")
    f = REDUCTIONS[d.mods.one_of(*REDUCTIONS)]
    kind = d.mods.one_of("u32", "s32", "b32")
    out, a = d.write(kind), d.read(1, kind)
    members = gathers(d, d.operands[2])

    def op(m, t):
        R, ids = m.R, m.ids[t]
        mask, values = R[members][t], R[a]
        result = np.empty(ids.size, DTYPES[kind])
        for pair in np.unique((ids >> 5) << 32 | mask.astype(np.int64)):
            here = ((ids >> 5) << 32 | mask.astype(np.int64)) == pair
            result[here] = f.reduce(values[ids[here]])
        R[out][t] = result

    return op


@instruction("activemask")
def _activemask(d):
    out = d.write(d.mods.one_of("b32"))

    def op(m, t):
        m.R[out][t] = _per_warp(m, m.ids[t], True)

    return op
