"""Tensor cores and their loads: mma.sync, ldmatrix, cp.async.

A fragment is a matrix distributed over a warp: with g = lane / 4 and q = lane % 4, a lane of mma
holds rows g and g + 8 of A, columns g of B, and columns 2q and 2q + 1 of C. Products are exact;
their sum with C is computed in float64 and rounded to float32 once. The hardware's order and width
of that sum are not specified.

A cp.async reads its source when it is issued, and writes shared memory when its own thread waits
for it. A read before that meets a pending copy, which is a finding.
"""

import numpy as np

from .access import address, space_and_hints
from .findings import UnsupportedPTX
from .memory import FLAT, elements
from .registers import instruction
from .rounding import canonical, from_bf16
from .shared import LANES
from .syntax import Register

SHAPES = {
    ("m16n8k16", 2): (4, 2),
    ("m16n8k8", 2): (2, 1),
    ("m16n8k8", 4): (4, 2),
    ("m16n8k4", 4): (2, 1),
}


def whole_warp(d):
    ins = d.ins
    d.program.gathers[ins.pc] = lambda m, t: m.gather(ins, t)


@instruction("mma")
def _mma(d):
    for word in ("sync", "aligned", "row", "col"):
        if not d.mods.flag(word):
            raise UnsupportedPTX(f"mma without .{word}")
    shape = d.mods.one_of("m16n8k16", "m16n8k8", "m16n8k4")
    if d.mods.left.count("f32") != 2:
        raise UnsupportedPTX("mma that does not accumulate in .f32")
    d.mods.left = [w for w in d.mods.left if w != "f32"]
    kinds = set(d.mods.left)
    d.mods.left = []
    if len(kinds) != 1 or not kinds <= {"f16", "bf16", "tf32"}:
        raise UnsupportedPTX(f"mma of {kinds}")
    kind = kinds.pop()
    size = 4 if kind == "tf32" else 2
    if (shape, size) not in SHAPES:
        raise UnsupportedPTX(f"{shape} of .{kind}")
    whole_warp(d)
    outs = d.vector(0, "f32", write=True)
    a, b, c = d.vector(1, "b32"), d.vector(2, "b32"), d.vector(3, "f32")
    if (len(a), len(b)) != SHAPES[shape, size] or len(c) != 4 or len(outs) != 4:
        raise UnsupportedPTX("a fragment of another size")
    per = 4 // size  # elements per register

    def numbers(m, t, slots):
        """(register, warp, g, q, element of the register) → float64"""
        raw = np.stack([m.R[s][t] for s in slots])
        if kind == "tf32":
            values = (raw & np.uint32(0xFFFFE000)).view(np.float32)
        elif kind == "f16":
            values = raw.view(np.float16)
        else:
            values = from_bf16(raw.view(np.uint16))
        return values.reshape(len(slots), -1, 8, 4, per).astype(np.float64)

    def op(m, t):
        R = m.R
        x = numbers(m, t, a)
        x = x.reshape(
            len(a) // 2, 2, -1, 8, 4, per
        )  # (half of k, half of rows, warp, g, q, element)
        x = x.transpose(2, 1, 3, 0, 4, 5).reshape(x.shape[2], 16, -1)
        y = numbers(m, t, b).transpose(1, 0, 3, 4, 2).reshape(x.shape[0], -1, 8)
        z = np.stack([R[s][t] for s in c]).reshape(
            2, 2, -1, 8, 4
        )  # (half of rows, column, warp, g, q)
        product = (x @ y).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
        z = canonical((product + z).astype(np.float32)).reshape(4, -1)
        for s, row in zip(outs, z, strict=True):
            R[s][t] = row
        m.counts.mma += x.shape[0]

    return op


@instruction("ldmatrix")
def _ldmatrix(d):
    for word in ("sync", "aligned", "m8n8", "b16"):
        if not d.mods.flag(word):
            raise UnsupportedPTX(f"ldmatrix without .{word}")
    count = int(d.mods.one_of("x1", "x2", "x4")[1])
    transposed = d.mods.flag("trans")
    if space_and_hints(d) != "shared":
        raise UnsupportedPTX("ldmatrix not of .shared")
    whole_warp(d)
    outs, at, ins = d.vector(0, "b32", write=True), address(d, d.operands[1]), d.ins
    if len(outs) != count:
        raise UnsupportedPTX("another number of results")

    def op(m, t):
        # Lane 8 i + r addresses row r of matrix i; lane l gets elements 2 (l % 4) and 2 (l % 4) + 1
        # of row l / 4
        ids = m.ids[t].reshape(-1, 32)[:, : 8 * count].ravel()
        rows = at(m, t).reshape(-1, 32)[:, : 8 * count].ravel()
        shared = m.shared
        grains = shared.check(m, ins, "ldmatrix", rows, 16, ids)
        shared.note_read(m, ins, grains, ids, LANES)
        if m.launch.banks:
            shared.count_conflicts(rows, 16, ids)
        words = shared.views[4][shared.index(rows, 4, 4, ids)].reshape(-1, count, 8, 4)
        if transposed:
            halves = words.view(np.uint16).transpose(0, 1, 3, 2)
            words = np.ascontiguousarray(halves).view(np.uint32)
        R = m.R
        for i, out in enumerate(outs):
            R[out][t] = words[:, i].ravel()

    return op


class Copies:
    """The asynchronous copies of a machine in batches, one per executed instruction."""

    def __init__(self, n):
        self.committed = np.zeros(n, np.int64)  # groups, per thread
        self.batches = []

    def wait(self, m, t, allowed):
        """Finishes the copies of these threads except those in the newest `allowed` groups; None
        finishes all, committed or not."""
        limit = np.zeros(m.n, np.int64)
        limit[t] = 2**62 if allowed is None else self.committed[t] - allowed
        left = []
        for ins, ids, group, addresses, values, source in self.batches:
            done = group < limit[ids]
            if done.any():
                _land(m, ins, ids[done], addresses[done], values[done], source, done)
                if done.all():
                    continue
                keep = ~done
                ids, group, addresses, values = (
                    ids[keep],
                    group[keep],
                    addresses[keep],
                    values[keep],
                )
                source = tuple(s[keep] for s in source)
            left.append((ins, ids, group, addresses, values, source))
        self.batches = left
        m.shared.copies = len(left)


def _land(m, ins, ids, addresses, values, source, done):
    shared, size = m.shared, values.shape[1]
    grains = shared.check(m, ins, "cp.async", addresses, size, ids)
    np.subtract.at(shared.pending, grains, 1)
    where, count = (s[done] for s in source)
    again = _source(where, count, size)
    if (again != values).any():
        what = "copies from global memory that was overwritten before it had been waited for"
        raise m.fault(ins, "async", what, ids[(again != values).any(1)])
    shared.writes[grains] = shared.now[ids][:, None]
    index = shared.index(addresses, 1, size, ids)
    shared.data[index] = values
    shared.same_values(m, ins, index, values, grains, ids)


def _source(addresses, count, size):
    """`size` bytes each: `count` from global memory, the others zero."""
    full = count == size
    out = np.zeros((addresses.size, size), np.uint8)
    if full.any():
        word = min(size, 8)
        out[full] = FLAT[word][elements(addresses[full], word, size // word)].view(np.uint8)
    for i in np.flatnonzero(~full & (count > 0)):
        out[i, : count[i]] = FLAT[1][elements(addresses[i : i + 1], 1, int(count[i]))]
    return out


@instruction("cp")
def _cp(d):
    if not d.mods.flag("async"):
        raise UnsupportedPTX("cp without .async")
    if d.mods.flag("commit_group"):

        def commit(m, t):
            m.copies.committed[t] += 1

        return commit
    if d.mods.flag("wait_all"):
        return lambda m, t: m.copies.wait(m, t, None)
    if d.mods.flag("wait_group"):
        allowed = int(d.operands[0].text, 0)
        return lambda m, t: m.copies.wait(m, t, allowed)
    return _copy(d)


def _copy(d):
    cache = d.mods.one_of("ca", "cg")
    d.mods.skip("L2::")
    d.mods.one_of("shared", "shared::cta")
    d.mods.one_of("global")
    size = int(d.operands[2].text, 0)
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise UnsupportedPTX(f"cp.async.{cache} of {size} bytes")
    target, origin, ins = address(d, d.operands[0]), address(d, d.operands[1]), d.ins
    fourth = d.operands[3] if len(d.operands) > 3 else None
    ignore = isinstance(fourth, Register) and fourth.type == "pred"
    length = None
    if ignore:
        length = d.slots.read(fourth, "pred")
    elif fourth is not None and not (isinstance(fourth, Register) and fourth.type == "b64"):
        length = d.slots.read(fourth, "u32")
    d.program.grain = min(d.program.grain, size)

    def op(m, t):
        to, source, ids, shared = target(m, t), origin(m, t), m.ids[t], m.shared
        count = np.full(ids.size, size, np.int64)
        if length is not None:
            given = m.R[length][t]
            count = np.where(given, 0, size) if ignore else np.minimum(given, size).astype(np.int64)
            if not ignore and (given > size).any():
                raise m.fault(ins, "bounds", "a source larger than the copy", ids[given > size])
        grains = shared.check(m, ins, "cp.async", to, size, ids)
        shared.note_write(m, ins, grains, ids, stamp=False)
        m.memory.check_copy(m, ins, source, count, size, ids)
        values = _source(source, count, size)
        if m.launch.canary:
            m.memory.check_canary(m, ins, values, count, ids)
        m.counts.global_bytes_read += int(count.sum())
        np.add.at(shared.pending, grains, 1)
        if (shared.pending[grains] > 1).any():
            twice = (shared.pending[grains] > 1).any(1)
            raise m.fault(ins, "async", "two copies into the same shared bytes at once", ids[twice])
        if m.launch.banks:
            shared.count_conflicts(to, size, t)
        m.copies.batches.append((ins, ids, m.copies.committed[ids], to, values, (source, count)))
        shared.copies = len(m.copies.batches)

    return op
