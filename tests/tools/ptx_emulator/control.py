"""Branches, exits, barriers, and calls."""

import numpy as np

from .findings import UnsupportedPTX
from .registers import instruction
from .syntax import Immediate


def predicate(d):
    """f(m, t) → the threads that execute the instruction, or None for all."""
    if d.ins.predicate is None:
        return None
    slot, negated = d.slots.read(d.ins.predicate, "pred"), d.ins.predicate.negated
    return (lambda m, t: ~m.R[slot][t]) if negated else (lambda m, t: m.R[slot][t])


def ends_with(d, function):
    """Ends a run with function(m, t) → PC or None, for the threads whose predicate holds; the
    others continue."""
    when, following = predicate(d), d.ins.pc + 1
    if when is None:
        d.program.ends[d.ins.pc] = function
        return

    def end(m, t):
        keep = when(m, t)
        if keep.all():
            return function(m, t)
        if not keep.any():
            return following
        ids = m.ids[t]
        m.pc[ids[~keep]] = following
        pc = function(m, ids[keep])
        if pc is not None:
            m.pc[ids[keep]] = pc
        return None

    d.program.ends[d.ins.pc] = end


@instruction("bra")
def _bra(d):
    d.mods.flag("uni")
    target, following = d.slots.kernel.labels[d.operands[0].name], d.ins.pc + 1
    when = predicate(d)
    if when is None:
        d.program.ends[d.ins.pc] = lambda m, t: target
    else:
        d.program.ends[d.ins.pc] = lambda m, t: m.branch(t, when(m, t), target, following)


@instruction("brx")
def _brx(d):
    d.mods.flag("idx", "uni")
    kernel = d.slots.kernel
    targets = np.array([kernel.labels[name] for name in kernel.tables[d.operands[1].name]])
    index, ins = d.read(0, "u32"), d.ins

    def end(m, t):
        i = m.R[index][t]
        if (i >= targets.size).any():
            raise m.fault(ins, "bounds", "jumps past its table", m.ids[t][i >= targets.size])
        m.pc[t] = targets[i]

    ends_with(d, end)


@instruction("ret", "exit")
def _exit(d):
    d.mods.flag("uni")
    ends_with(d, lambda m, t: m.exit(t))


@instruction("trap")
def _trap(d):
    ins = d.ins

    def end(m, t):
        raise m.fault(ins, "trap", "traps", m.ids[t])

    ends_with(d, end)


@instruction("call")
def _call(d):
    """Supports only the call of a failed assertion, which ends the launch."""
    d.mods.flag("uni")
    ins = d.ins
    names = [getattr(o, "name", "") for o in d.operands]
    if "__assertfail" not in names:
        raise UnsupportedPTX("calls of functions")

    def op(m, t):
        raise m.fault(ins, "trap", "an assertion fails", m.ids[t])

    return op


@instruction("bar", "barrier")
def _barrier(d):
    d.mods.flag("cta", "aligned")
    how = d.mods.one_of("sync", "red", "warp", default="unknown")
    if how == "warp":
        return _warp_barrier(d)
    if how == "unknown":
        raise UnsupportedPTX("a barrier that is not .sync, .red or .warp.sync")
    reduction = d.mods.one_of("popc", "and", "or") if how == "red" else None
    if reduction:
        return _reduction(d, reduction)
    ins, operands = d.ins, d.operands
    number = d.read(0, "u32")
    count = d.read(1, "u32") if len(operands) > 1 else None

    def end(m, t):
        return m.barrier(t, ins, m.R[number][t], None if count is None else m.R[count][t])

    ends_with(d, end)
    return None


def _reduction(d, how):
    """bar.red: counts the block's threads with a true p, or tests whether all or any have it."""
    kind = d.mods.one_of("u32", "pred")
    ins, out, number = d.ins, d.write(kind), d.read(1, "u32")
    p, negated = d.read(-1, "pred"), d.operands[-1].negated
    count = d.read(2, "u32") if len(d.operands) > 3 else None

    def release(m, ids):
        if not ids.size:
            return
        value = m.R[p][ids] ^ negated
        total = np.bincount(m.block_of[ids], value, m.blocks)[m.block_of[ids]]
        size = np.bincount(m.block_of[ids], minlength=m.blocks)[m.block_of[ids]]
        m.R[out][ids] = {"popc": total, "and": total == size, "or": total > 0}[how]

    def end(m, t):
        m.on_release[ins.pc] = release
        pc = m.barrier(t, ins, m.R[number][t], None if count is None else m.R[count][t])
        if pc is not None:
            release(m, m.ids[t])
        return pc

    ends_with(d, end)


def _warp_barrier(d):
    d.mods.flag("sync")
    ins, members = d.ins, d.read(0, "b32")
    every = isinstance(d.operands[0], Immediate) and int(d.operands[0].text, 0) in (-1, 0xFFFFFFFF)
    d.program.gathers[ins.pc] = lambda m, t: m.gather(
        ins, t, None if every and m.everyone else m.R[members][t]
    )
    return lambda m, t: m.shared.warp_barrier(t)
