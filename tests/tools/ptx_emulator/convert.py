"""mov, cvt and cvta: conversions between formats.

Integers keep the low bits, or saturate. Floating point to integer rounds as specified and
saturates; NaN becomes zero, or the lowest signed number in a 64-bit conversion. Other rounding is
in rounding.py.
"""

import numpy as np

from .findings import UnsupportedPTX
from .registers import (
    DTYPES,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    UNSIGNED,
    apply,
    instruction,
)  # fmt: skip
from .rounding import (
    canonical,
    flush,
    from_bf16,
    from_f16,
    nearest,
    odd,
    odd32,
    to_bf16,
    to_f16,
    to_tf32,
    two_sum,
)
from .syntax import BYTES, Vector

WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOATS = ("f16", "bf16", "f32", "f64")
WINDOWS = {
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
    "param": PARAM_WINDOW,
    "global": 0,
    "const": 0,
}


@instruction("mov")
def _mov(d):
    kind = d.mods.type()
    source, target = d.operands[1], d.operands[0]
    if isinstance(source, Vector):
        return _pack(d, kind, source, target)
    if isinstance(target, Vector):
        return _unpack(d, kind, source, target)
    if kind in ("f16", "bf16"):
        kind = "b16"
    return apply(lambda a: a, d.write(kind), [d.read(1, kind)])


def _pack(d, kind, source, target):
    """Packs {low, ..., high} into one register."""
    part = BYTES[kind] // len(source.items)
    sources = [d.slots.read(o, f"b{8 * part}") for o in source.items]
    out = d.write(f"b{8 * BYTES[kind]}")

    def op(m, t):
        R = m.R
        parts = np.stack([R[s][t] for s in sources], axis=1)
        R[out][t] = parts.view(UNSIGNED[part * len(sources)])[:, 0]

    return op


def _unpack(d, kind, source, target):
    part = BYTES[kind] // len(target.items)
    outs = [d.slots.write(o, f"b{8 * part}") for o in target.items]
    a = d.read(1, f"b{8 * BYTES[kind]}")

    def op(m, t):
        R = m.R
        parts = np.ascontiguousarray(R[a][t]).view(UNSIGNED[part]).reshape(-1, len(outs))
        for i, out in enumerate(outs):
            R[out][t] = parts[:, i]

    return op


@instruction("cvta")
def _cvta(d):
    """Converts an address in a space to a generic address; with .to the other way."""
    back = d.mods.flag("to")
    space = d.mods.one_of("shared::cta", *WINDOWS).partition("::")[0]
    kind = d.mods.one_of("u64", "u32")
    if kind == "u32":
        raise UnsupportedPTX("32-bit generic addresses")
    window = np.uint64(WINDOWS[space])
    if back:
        return apply(lambda a: a - window, d.write(kind), [d.read(1, kind)])
    return apply(lambda a: a + window, d.write(kind), [d.read(1, kind)])


@instruction("cvt")
def _cvt(d):
    whole = d.mods.one_of(*WHOLE, default="none")
    mode = d.mods.one_of("rn", "rz", "rm", "rp", "rna", default="none")
    ftz, sat, relu, finite = (d.mods.flag(f) for f in ("ftz", "sat", "relu", "satfinite"))
    if d.mods.flag("pack"):
        raise UnsupportedPTX("cvt.pack")
    to = d.mods.type()
    source = d.mods.type()
    if to in ("f16x2", "bf16x2"):
        return _pair(d, to, source, mode, relu, finite)
    if finite:
        raise UnsupportedPTX("satfinite")
    load = {"f16": from_f16, "bf16": from_bf16}.get(source, lambda x: x)
    read = "b16" if source in ("f16", "bf16") else source
    write = "b16" if to in ("f16", "bf16") else "b32" if to == "tf32" else to
    if to not in FLOATS and to != "tf32":
        f = _to_integer(DTYPES[to], whole, sat) if source in FLOATS else _resize(DTYPES[to], sat)
    elif source in FLOATS:
        f = _float_to_float(to, source, "rn" if mode == "none" else mode, WHOLE.get(whole))
    else:
        f = _integer_to_float(to, mode)

    def g(x):
        x = load(x)
        if ftz and source == "f32":
            x = flush(x)
        y = f(x)
        if to in ("f32", "f64", "f16", "bf16") and (sat or relu or ftz):
            y = _clamp(y, to, sat, relu, ftz)
        return _bits(y, to)

    return apply(g, d.write(write), [d.read(1, read)])


def _clamp(y, to, sat, relu, ftz):
    if to in ("f16", "bf16") and (sat or relu):
        number = from_bf16(y) if to == "bf16" else from_f16(y.view(np.uint16))
        number = _clamp(number, "f32", sat, relu, False)
        return to_bf16(number) if to == "bf16" else to_f16(number)
    if sat:
        y = np.where(y > 0, np.minimum(y, y.dtype.type(1)), y.dtype.type(0))
    if relu:
        y = canonical(np.where(y < 0, y.dtype.type(0), y))
    return flush(y) if ftz and to == "f32" else y


def _bits(y, to):
    if to == "f16":
        return y.view(np.uint16)
    return canonical(y) if to == "f32" else y


def _resize(dtype, sat):
    if not sat:
        return lambda x: x.astype(dtype)
    limits = np.iinfo(dtype)

    def f(x):
        low = max(int(limits.min), int(np.iinfo(x.dtype).min))
        high = min(int(limits.max), int(np.iinfo(x.dtype).max))
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    return f


def _to_integer(dtype, whole, sat):
    if whole == "none":
        raise UnsupportedPTX("floating point to integer without a rounding")
    limits = np.iinfo(dtype)
    low, high = float(limits.min), float(limits.max)  # 2^63 or 2^64 is not representable in 64 bits

    def f(x):
        y = WHOLE[whole](x.astype(np.float64))
        wide = np.dtype(dtype).itemsize == 8
        inside = (y >= low) & ((y < high) if wide else (y <= high))
        out = np.where(inside, y, 0).astype(dtype)
        out = np.where(inside, out, np.where(y < low, dtype(limits.min), dtype(limits.max)))
        nan = dtype(0)
        if wide or x.dtype == np.float64:
            nan = UNSIGNED[np.dtype(dtype).itemsize](1 << 8 * np.dtype(dtype).itemsize - 1).astype(
                dtype
            )
        return np.where(x != x, nan, out).astype(dtype)

    return f


def _integer_to_float(to, mode):
    if mode == "none":
        raise UnsupportedPTX("integer to floating point without a rounding")

    def f(x):
        if x.dtype.itemsize < 8:
            s = x.astype(np.float64)
        else:  # in two parts, of 48 and 16 bits: 64 bits do not fit
            high = x & ~x.dtype.type(0xFFFF)
            s, error = two_sum(
                high.astype(np.float64), (x & x.dtype.type(0xFFFF)).astype(np.float64)
            )
            if to == "f64":
                return nearest_sum(s, error, mode)
            s = odd(s, error)
        if to == "f64":
            return s
        return _narrow(s, to, mode)

    return f


def nearest_sum(s, error, mode):
    if mode == "rn":
        return s
    wrong = {
        "rz": (error != 0) & ((error < 0) == (s > 0)), "rm": error < 0, "rp": error > 0,
    }[mode]  # fmt: skip
    toward = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
    return np.where(wrong, np.nextafter(s, toward), s)


def _narrow(s, to, mode):
    """Converts float64 or float32 to a narrower format."""
    if to == "f32":
        return nearest(s.astype(np.float64), np.float32, mode)
    if to == "f16":
        return to_f16(s, mode)
    return to_bf16(odd32(s) if s.dtype == np.float64 else s, mode)


def _float_to_float(to, source, mode, whole):
    def f(x):
        if whole is not None:
            x = whole(x)
        if to == "tf32":
            return to_tf32(x, mode)
        if to == "f64":
            return x.astype(np.float64)
        if to == "f32" and source != "f64":
            return x
        return _narrow(x, to, mode)

    return f


def _pair(d, to, source, mode, relu, finite):
    """Two float32: the first operand becomes the upper half."""
    if source != "f32" or mode not in ("rn", "rz") or finite:
        raise UnsupportedPTX(f"cvt to .{to}")

    def half(x):
        if relu:
            x = np.where(x < 0, np.float32(0), x)
        return (to_bf16(x, mode) if to == "bf16x2" else to_f16(x, mode).view(np.uint16)).astype(
            np.uint32
        )

    return apply(lambda a, b: half(a) << np.uint32(16) | half(b), d.write("b32"), d.reads("f32"))
