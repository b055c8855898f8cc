"""ld, st, atom and red, in every state space.

A generic address lies in one of the windows of registers.py, or else in host memory; the threads of
one instruction may access several spaces. Each space is an object with load(m, ins, addresses,
size, count, t) and store(m, ins, addresses, values, t).
"""

import numpy as np

from .findings import UnsupportedPTX
from .memory import FLAT, Params, elements
from .registers import DTYPES, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, UNSIGNED, instruction
from .rounding import pack, unpack
from .syntax import BYTES, Address, Immediate, Register, Symbol

SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
HINTS = ("L1::", "L2::", "cache_hint")
CACHE = ("ca", "cg", "cs", "lu", "cv", "nc", "wb", "wt", "volatile", "weak", "relaxed", "acquire",
         "release", "acq_rel", "cta", "gpu", "sys", "cluster", "mmio", "unified")  # fmt: skip


def space_and_hints(d):
    """The state space. Drops modifiers for caching and ordering, because launches here run one
    instruction after another."""
    d.mods.flag(*CACHE)
    d.mods.skip(*HINTS)
    return d.mods.one_of(*SPACES, default="generic").partition("::")[0]


def address(d, operand):
    """f(m, t) → int64 addresses."""
    if isinstance(operand, (Symbol, Register)):
        operand = Address(operand, 0)
    base, offset = operand.base, operand.offset
    if isinstance(base, Symbol):
        fixed = d.slots.symbol(base.name) + offset
        return lambda m, t: np.full(m.ids[t].size, fixed, np.int64)
    if isinstance(base, Immediate):
        return lambda m, t: np.full(m.ids[t].size, int(base.text, 0) + offset, np.int64)
    kind = f"u{8 * BYTES[base.type]}"
    slot = d.slots.read(base, kind)
    return lambda m, t: m.R[slot][t].astype(np.int64) + offset


def note_grain(d, space, nbytes):
    if space in ("shared", "generic"):
        d.program.grain = min(d.program.grain, nbytes)


def spaces(m, where):
    return {"global": m.memory, "const": m.memory, "shared": m.shared, "local": m.local,
            "param": PARAMS, "generic": GENERIC}[where]  # fmt: skip


PARAMS = Params()


class Generic:
    """Finds each thread's space from its address."""

    def _parts(self, m, addresses, t):
        every = (m.memory, m.shared, m.local, PARAMS)
        starts = (0, SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW)
        number = np.digitize(addresses, starts[1:])
        ids = m.ids[t]
        for i in np.unique(number):
            here = number == i
            yield every[i], here, addresses[here] - starts[i], ids[here]

    def load(self, m, ins, addresses, size, count, t):
        out = np.empty((addresses.size, count), UNSIGNED[size])
        for space, here, local, ids in self._parts(m, addresses, t):
            out[here] = space.load(m, ins, local, size, count, ids)
        return out

    def store(self, m, ins, addresses, values, t):
        for space, here, local, ids in self._parts(m, addresses, t):
            space.store(m, ins, local, values[here], ids)


GENERIC = Generic()


@instruction("ld", "ldu")
def _ld(d):
    where = space_and_hints(d)
    count = int(d.mods.one_of("v2", "v4", default="v1")[1])
    kind = d.mods.type()
    if kind in ("f16", "bf16"):
        kind = "b16"
    ins, size, dtype = d.ins, BYTES[kind], DTYPES[kind]
    at = address(d, d.operands[1])
    outs = d.vector(0, kind, write=True)
    if len(outs) != count:
        raise UnsupportedPTX(f"{len(outs)} results of .v{count}")
    note_grain(d, where, size * count)

    def op(m, t):
        values = spaces(m, where).load(m, ins, at(m, t), size, count, t).view(dtype)
        R = m.R
        for i, out in enumerate(outs):
            R[out][t] = values[:, i]

    return op


@instruction("st")
def _st(d):
    where = space_and_hints(d)
    count = int(d.mods.one_of("v2", "v4", default="v1")[1])
    size = BYTES[d.mods.type()]
    if where == "param":  # an argument of a call
        return None
    ins, at = d.ins, address(d, d.operands[0])
    sources = d.vector(1, f"b{8 * size}")
    if len(sources) != count:
        raise UnsupportedPTX(f"{len(sources)} values of .v{count}")
    note_grain(d, where, size * count)

    def op(m, t):
        R = m.R
        values = np.stack([R[s][t] for s in sources], axis=1)
        spaces(m, where).store(m, ins, at(m, t), values, t)

    return op


@instruction("prefetch", "prefetchu", "discard", "applypriority", "membar", "fence", "nanosleep")
def _no_effect(d):
    """An instruction without an effect here: there are no caches, and instructions run in order."""
    d.mods.left.clear()
    return None


@instruction("createpolicy")
def _createpolicy(d):
    d.mods.left.clear()
    out = d.write("b64")

    def op(m, t):
        m.R[out][t] = 0

    return op


# atom and red: one thread after another, in the order of their numbers


def _cas(old, new, other):
    return np.where(old == new, other, old)


ATOMICS = {
    "add": lambda old, x: old + x, "min": np.minimum, "max": np.maximum, "exch": lambda old, x: x,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "inc": lambda old, x: np.where(old >= x, x.dtype.type(0), old + x.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - x.dtype.type(1)),
    "cas": _cas,
}  # fmt: skip


def _half(f, kind):
    return lambda old, x: pack(f(unpack(old, kind), unpack(x, kind)), kind)


@instruction("atom", "red")
def _atom(d):
    d.mods.flag("noftz", *CACHE)
    d.mods.skip(*HINTS)
    where = d.mods.one_of(*SPACES, default="generic").partition("::")[0]
    f = ATOMICS[d.mods.one_of(*ATOMICS)]
    kind = d.mods.type()
    size, ins, first = BYTES[kind], d.ins, int(d.op == "atom")
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        f, dtype = _half(f, kind), UNSIGNED[size]
    else:
        dtype = DTYPES[kind]
    word = f"b{8 * size}"
    at = address(d, d.operands[first])
    sources = [d.slots.read(o, word) for o in d.operands[first + 1 :]]
    out = d.slots.write(d.operands[0], word) if first else None
    note_grain(d, where, size)

    def op(m, t):
        addresses, R = at(m, t), m.R
        values = [np.ascontiguousarray(R[s][t]).view(dtype) for s in sources]
        view, index = _elements(m, ins, where, addresses, size, t)
        old = np.empty(addresses.size, dtype)
        for now in _turns(index):
            old[now] = view[index[now]].view(dtype)
            new = f(old[now], *(v[now] for v in values))
            view[index[now]] = np.asarray(new, dtype).view(view.dtype)
        if out is not None:
            R[out][t] = old.view(UNSIGNED[size])

    return op


def _turns(index):
    """Threads in rounds, in order: within a round every address occurs once."""
    order = np.argsort(index, kind="stable")
    ranked = index[order]
    start = np.searchsorted(ranked, ranked)
    rank = np.arange(index.size) - start
    return [order[rank == r] for r in range(int(rank.max(initial=-1)) + 1)]


def _elements(m, ins, where, addresses, size, t):
    """(a flat view, its elements to access), after the checks of a load and a store."""
    if where == "generic":
        if (addresses >= SHARED_WINDOW).all():
            where, addresses = "shared", addresses - SHARED_WINDOW
        elif (addresses < SHARED_WINDOW).all():
            where = "global"
        else:
            raise UnsupportedPTX("atomics on several state spaces at once")
    if where == "shared":
        return m.shared.atomic(m, ins, addresses, size, t)
    m.memory.load(m, ins, addresses, size, 1, t)
    m.counts.global_bytes_written += size * addresses.size
    return FLAT[size], elements(addresses, size)[:, 0]
