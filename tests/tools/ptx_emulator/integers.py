"""Integer and bit instructions. numpy wraps around as PTX does. The rest is where PTX differs from
C: shifts past the width, the upper half of a product, division that truncates.

PTX leaves division by zero undefined. Here, as on the hardware, all bits of the quotient are set.
"""

import numpy as np

from .findings import UnsupportedPTX
from .registers import DTYPES, UNSIGNED, apply, instruction
from .syntax import Immediate, Register

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "b8", "b16", "b32", "b64")
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def wide(a, b):
    """The full product of factors of up to 32 bits."""
    kind = np.int64 if a.dtype.kind == "i" else np.uint64
    return a.astype(kind) * b.astype(kind)


def mul_hi(a, b):
    if a.dtype.itemsize < 8:
        return (wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + ((x0 * y0) >> shift)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":  # modulo 2^64 a negative factor equals itself plus 2^64
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def div(a, b):
    zero = b == 0
    d = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        q, r = a // d, a % d
        q = q + ((r != 0) & ((a < 0) != (d < 0)))  # numpy rounds down
    else:
        q = a // d
    return np.where(zero, ~b.dtype.type(0), q).astype(a.dtype)


def rem(a, b):
    d = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, a - div(a, d) * d).astype(a.dtype)


def shl(a, n):
    return np.where(n < 8 * a.dtype.itemsize, a << _clamp(a, n), a.dtype.type(0))


def shr(a, n):
    bits = 8 * a.dtype.itemsize
    beyond = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(n < bits, a >> _clamp(a, n), beyond)


def _clamp(a, n):
    return np.minimum(n, 8 * a.dtype.itemsize - 1).astype(a.dtype)


def funnel(left, wrap):
    def f(a, b, c):
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        if left:  # a shift by 64 bits never occurs: n <= 32
            return (both >> (np.uint64(32) - n)).astype(np.uint32)
        return np.where(n == 32, both >> np.uint64(32), both >> n).astype(np.uint32)

    return f


def bfe(a, b, c):
    """len bits from position pos. Signed: filled with the field's top bit, or a's."""
    bits = 8 * a.dtype.itemsize
    pos, length = (b & 255).astype(np.int64), (c & 255).astype(np.int64)
    value = a.astype(object) if bits == 64 else a.astype(np.int64)
    if bits == 64:
        out = [
            _bfe_one(int(x), int(p), int(n), a.dtype)
            for x, p, n in zip(value, pos, length, strict=True)
        ]
        return np.array(out, dtype=a.dtype)
    signed = a.dtype.kind == "i"
    top = np.minimum(pos + length - 1, bits - 1)
    raw = value & ((1 << bits) - 1)
    field = np.where(pos < bits, raw >> np.minimum(pos, bits - 1), 0)
    kept = np.minimum(length, np.maximum(bits - pos, 0))
    field = field & ((np.int64(1) << kept) - 1)
    if signed:
        negative = ((raw >> np.maximum(top, 0)) & 1).astype(bool) & (length > 0)
        field = np.where(negative, field | (np.int64(-1) << kept), field)
    return field.astype(a.dtype)


def _bfe_one(x, pos, length, dtype):
    raw = x & (1 << 64) - 1
    kept = max(min(length, 64 - pos), 0)
    field = (raw >> pos) & ((1 << kept) - 1)
    if dtype.kind == "i" and length and raw >> min(pos + length - 1, 63) & 1:
        field -= 1 << kept
    return field


def bfi(a, b, c, d):
    """b with len bits from position pos replaced by the low bits of a."""
    kind, bits = a.dtype.type, 8 * a.dtype.itemsize
    pos, length = np.minimum(c & 255, bits), np.minimum(d & 255, bits)
    mask = shl(shr(np.full_like(a, ~kind(0)), bits - length), pos)
    mask = np.where(length == 0, kind(0), mask)
    return (b & ~mask) | (shl(a, pos) & mask)


def popc(a):
    return np.bitwise_count(a).astype(np.uint32)


def clz(a):
    bits = 8 * a.dtype.itemsize
    x = a.copy()
    for step in (32, 16, 8, 4, 2, 1):
        if step < bits:
            x = x | (x >> a.dtype.type(step))
    return (bits - np.bitwise_count(x).astype(np.int64)).astype(np.uint32)


def bfind(amount):
    def f(a):
        x = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
        zeros = clz(x.astype(UNSIGNED[a.dtype.itemsize]))
        top = np.uint32(8 * a.dtype.itemsize - 1)
        return np.where(x == 0, ~np.uint32(0), zeros if amount else top - zeros)

    return f


def brev(a):
    raw = np.ascontiguousarray(a).view(np.uint8).reshape(-1, a.dtype.itemsize)
    bits = np.packbits(
        np.unpackbits(raw[:, ::-1], axis=1, bitorder="big"), axis=1, bitorder="little"
    )
    return np.ascontiguousarray(bits).view(a.dtype)[:, 0]


def prmt(a, b, c):
    """Each nibble of c selects a byte of {b, a}; its top bit replicates the byte's sign instead."""
    pool = b.astype(np.uint64) << np.uint64(32) | a
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (c >> np.uint32(4 * i)).astype(np.uint64)
        byte = pool >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def lop3(table):
    def f(a, b, c):
        out = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return f


def saturated(f):
    """add.sat and sub.sat, of s32."""
    limits = np.iinfo(np.int32)

    def g(a, b):
        return np.clip(f(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max).astype(
            np.int32
        )

    return g


def relu(f):
    return lambda a, b: np.maximum(f(a, b), a.dtype.type(0))


def widened(dtype):
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


LOGIC = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
}  # fmt: skip


@instruction(*LOGIC)
def _logic(d):
    return d.apply(LOGIC[d.op], d.mods.one_of("pred", "b16", "b32", "b64"))


@instruction("shl", "shr")
def _shift(d):
    kind = d.mods.type()
    f = shl if d.op == "shl" else shr
    return apply(f, d.write(kind), [d.read(1, kind), d.read(2, "u32")])


@instruction("shf")
def _funnel(d):
    f = funnel(d.mods.one_of("l", "r") == "l", d.mods.one_of("wrap", "clamp") == "wrap")
    return d.apply(f, d.mods.type())


@instruction("bfe")
def _bfe(d):
    kind = d.mods.type()
    return apply(bfe, d.write(kind), [d.read(1, kind), d.read(2, "u32"), d.read(3, "u32")])


@instruction("bfi")
def _bfi(d):
    kind = d.mods.type()
    return apply(
        bfi, d.write(kind), [d.read(1, kind), d.read(2, kind), d.read(3, "u32"), d.read(4, "u32")]
    )


@instruction("popc", "clz", "bfind")
def _count(d):
    f = {"popc": popc, "clz": clz, "bfind": bfind(d.mods.flag("shiftamt"))}[d.op]
    return d.apply(f, d.mods.type(), "u32")


@instruction("brev", "prmt")
def _bytes(d):
    return d.apply({"brev": brev, "prmt": prmt}[d.op], d.mods.type())


@instruction("lop3")
def _lop3(d):
    if not isinstance(d.operands[4], Immediate):
        raise UnsupportedPTX("a table that is no immediate")
    return d.apply(lop3(int(d.operands[4].text, 0)), d.mods.type(), count=3)


def integer(d, kind):
    """add, sub, mul, mad, div, rem, min, max, abs, neg, sad for integers."""
    if d.op in ("mul", "mad"):
        return _multiply(d, kind)
    plain = {
        "add": np.add, "sub": np.subtract, "div": div, "rem": rem, "min": np.minimum,
        "max": np.maximum, "abs": np.abs, "neg": np.negative,
    }  # fmt: skip
    f = plain[d.op]
    if d.op in ("add", "sub"):
        if d.mods.flag("cc"):
            return _carry(d, kind, False, True)
        if d.mods.flag("sat"):
            f = saturated(f)
    elif d.op in ("min", "max") and d.mods.flag("relu"):
        f = relu(f)
    return d.apply(f, kind)


def _multiply(d, kind):
    part = d.mods.one_of("lo", "hi", "wide")
    if d.mods.flag("cc"):
        raise UnsupportedPTX("a product with a carry")
    result = WIDER[kind] if part == "wide" else kind
    f = {"lo": np.multiply, "hi": mul_hi, "wide": widened(DTYPES[result])}[part]
    if d.op == "mul":
        return d.apply(f, kind, result)
    sources = [d.read(1, kind), d.read(2, kind), d.read(3, result)]
    return apply(lambda a, b, c: f(a, b) + c, d.write(result), sources)


@instruction("rem")
def _rem(d):
    return integer(d, d.mods.one_of(*INTEGERS))


@instruction("addc", "subc")
def _with_carry(d):
    return _carry(d, d.mods.one_of("u32", "s32", "b32", "u64", "s64"), True, d.mods.flag("cc"))


def _carry(d, kind, takes, gives):
    """Addition and subtraction with the carry flag, a register without a name in PTX."""
    subtract = d.op.startswith("sub")
    kind = "u" + kind[1:]
    out, (a, b) = d.write(kind), d.reads(kind)
    carry = d.slots.read(Register("%cc", "pred"), "pred")
    one = DTYPES[kind](1)

    def op(m, t):
        R = m.R
        x, y = R[a][t], R[b][t]
        c = R[carry][t] * one if takes else one * 0
        total = x - y if subtract else x + y
        first = (x < y) if subtract else (total < x)
        result = total - c if subtract else total + c
        if gives:
            R[carry][t] = first | ((total < c) if subtract else (result < total))
        R[out][t] = result

    return op
