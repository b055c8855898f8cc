"""setp and set, selp, slct: comparisons and choices."""

import numpy as np

from .floats import FLOATS
from .registers import DTYPES, apply, instruction
from .rounding import flush, unpack
from .syntax import Vector


def _ordered(f):
    return lambda a, b: f(a, b) & (a == a) & (b == b)


def _unordered(f):
    return lambda a, b: f(a, b) | (a != a) | (b != b)


INTEGER = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
FLOAT = {name: INTEGER[name] for name in ("eq", "lt", "le", "gt", "ge")}
FLOAT |= {name + "u": _unordered(INTEGER[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
FLOAT |= {
    "ne": _ordered(np.not_equal),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(d):
    """(f(a, b) → bool, the type to read, whether registers hold pairs, the operator that combines
    the result with another predicate, the type of set's result)"""
    name = d.mods.one_of(*FLOAT, *INTEGER)
    combine = COMBINE.get(d.mods.one_of(*COMBINE, default="none"))
    ftz = d.mods.flag("ftz")
    result = d.mods.type() if d.op == "set" else None
    kind = d.mods.type()
    compare = (FLOAT if kind in FLOATS else INTEGER)[name]
    if kind == "f32" and ftz:
        return lambda a, b: compare(flush(a), flush(b)), kind, False, combine, result
    if kind not in ("f16", "bf16", "f16x2", "bf16x2"):
        return compare, kind, False, combine, result
    pairs = kind.endswith("x2")

    def halves(a, b):
        return compare(unpack(a, kind), unpack(b, kind))

    return halves, "b32" if pairs else "b16", pairs, combine, result


def _third(d):
    """The predicate to combine with the result, and whether it is negated."""
    operand = d.operands[3]
    return d.slots.read(operand, "pred"), operand.negated


@instruction("setp")
def _setp(d):
    compare, kind, pairs, combine, _ = _comparison(d)
    a, b = d.reads(kind, 1, 2)
    both = isinstance(d.operands[0], Vector)
    p, *q = d.vector(0, "pred", write=True)
    c, negated = _third(d) if combine else (None, False)
    if not both and not combine:
        return apply(compare, p, [a, b])

    def op(m, t):
        R = m.R
        first = compare(R[a][t], R[b][t])
        second = ~first
        if pairs:
            first, second = first[0::2], first[1::2]
        if combine:
            other = ~R[c][t] if negated else R[c][t]
            first, second = combine(first, other), combine(second, other)
        R[p][t] = first
        if q:
            R[q[0]][t] = second

    return op


@instruction("set")
def _set(d):
    compare, kind, pairs, combine, result = _comparison(d)
    sources = d.reads(kind, 1, 2)
    c, negated = _third(d) if combine else (None, False)
    if pairs:
        true = np.uint16(0xFFFF)
        if result in ("f16x2", "bf16x2"):
            true = np.uint16(0x3C00 if result == "f16x2" else 0x3F80)

        def masks(a, b):
            return (compare(a, b) * true).astype(np.uint16).view(np.uint32)

        return apply(masks, d.write("b32"), sources)
    if result in ("f16", "bf16"):
        true, result = np.uint16(0x3C00 if result == "f16" else 0x3F80), "b16"
    else:
        true = DTYPES[result](1) if result == "f32" else ~DTYPES["u" + result[1:]](0)
    out = d.write(result if result == "f32" else "u" + result[1:])

    def op(m, t):
        R = m.R
        found = compare(R[sources[0]][t], R[sources[1]][t])
        if combine:
            found = combine(found, ~R[c][t] if negated else R[c][t])
        R[out][t] = found * true

    return op


@instruction("selp")
def _selp(d):
    kind = d.mods.type()
    kind = "b16" if kind in ("f16", "bf16") else kind
    return apply(
        lambda a, b, p: np.where(p, a, b),
        d.write(kind),
        [d.read(1, kind), d.read(2, kind), d.read(3, "pred")],
    )


@instruction("slct")
def _slct(d):
    kind = d.mods.type()
    by = d.mods.one_of("s32", "f32")
    ftz = d.mods.flag("ftz")

    def f(a, b, c):
        return np.where((flush(c) if ftz else c) >= 0, a, b)

    return apply(f, d.write(kind), [d.read(1, kind), d.read(2, kind), d.read(3, by)])
