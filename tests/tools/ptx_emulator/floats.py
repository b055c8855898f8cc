"""Floating-point instructions.

add, sub, mul, fma, div.rn, sqrt.rn and rcp.rn round once, as on the hardware, and return the
hardware's NaN. The approximations (ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div.approx and
div.full) are computed in float64 and rounded: within PTX's documented errors, but with other bits
than the hardware's. 16-bit types are computed in float32, which is wide enough for double rounding
to be harmless, except in fma.
"""

import functools

import numpy as np

from .findings import UnsupportedPTX
from .integers import INTEGERS, integer
from .registers import apply, instruction
from .rounding import (
    NAN32,
    add32,
    canonical,
    flush,
    fma32,
    fma64,
    nearest,
    odd,
    odd32,
    pack,
    two_sum,
    unpack,
)  # fmt: skip

FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
ROUNDING = ("rn", "rz", "rm", "rp")


def lift(f, kind):
    """f of float32 arrays as a function of 16-bit registers, or of 32-bit registers with a pair."""
    return lambda *registers: pack(f(*(unpack(r, kind) for r in registers)), kind)


def _fma_half(kind):
    """An exact product plus c, in float64 with a sticky last bit, then rounded."""

    def f(a, b, c):
        s, error = two_sum(a.astype(np.float64) * b, c.astype(np.float64))
        s = odd(s, error)
        return odd32(s) if kind.startswith("bf") else s

    return f


def maximum(a, b):
    """The larger number; a number if the other is NaN; +0 of two zeros."""
    r = np.fmax(a, b)
    zero = (a == 0) & (b == 0)
    if zero.any():
        r = np.where(zero, a + b, r)  # -0 only if both are
    return canonical(r)


def minimum(a, b):
    r = np.fmin(a, b)
    zero = (a == 0) & (b == 0)
    if zero.any():
        r = np.where(zero, -(-a - b), r)  # +0 only if both are
    return canonical(r)


def propagating(f):
    """min.NaN and max.NaN: NaN wins."""

    def g(*xs):
        r = f(*xs)
        for x in xs:
            r = np.where(x != x, x, r)
        return canonical(r)

    return g


def saturate(x):
    """.sat: to [0, 1]; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu(x):
    return canonical(np.where(x < 0, x.dtype.type(0), x))


def div_full(a, b):
    return (a.astype(np.float64) / b).astype(np.float32)


def div_approx(a, b):
    """As div.full for |b| up to 2^126; beyond, the reciprocal flushes to zero."""
    q = div_full(a, b)
    huge = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(huge, np.where(np.isinf(a), NAN32, np.copysign(np.float32(0), q)), q)


def _in_float64(f):
    return lambda x: f(x.astype(np.float64)).astype(np.float32)


APPROXIMATE = {
    "ex2": _in_float64(np.exp2), "lg2": _in_float64(np.log2), "sin": _in_float64(np.sin),
    "cos": _in_float64(np.cos), "tanh": _in_float64(np.tanh), "sqrt": _in_float64(np.sqrt),
    "rcp": _in_float64(lambda x: 1 / x), "rsqrt": _in_float64(lambda x: 1 / np.sqrt(x)),
}  # fmt: skip
EXACT = {"sqrt": np.sqrt, "rcp": lambda x: x.dtype.type(1) / x}
PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@instruction("add", "sub", "mul", "min", "max", "abs", "neg", "div", "mad")
def _arithmetic(d):
    kind = d.mods.one_of(*FLOATS, default="none")
    if kind == "none":
        return integer(d, d.mods.one_of(*INTEGERS))
    if d.op in ("abs", "neg"):
        return _sign(d, kind)
    if d.op == "mad":
        return _fused(d, kind)
    if d.op in ("min", "max"):
        f = maximum if d.op == "max" else minimum
        f = propagating(f) if d.mods.flag("NaN") else f
        return _finish(d, f, kind)
    if d.op == "div":
        return _divide(d, kind)
    mode = d.mods.one_of(*ROUNDING, default="rn")
    f = PLAIN[d.op]
    if mode != "rn":
        if kind != "f32":
            raise UnsupportedPTX(f".{mode}.{kind}")
        f = {
            "add": lambda a, b: add32(a, b, mode),
            "sub": lambda a, b: add32(a, -b, mode),
            "mul": lambda a, b: nearest(a.astype(np.float64) * b, np.float32, mode),
        }[d.op]
    return _finish(d, f, kind)


@instruction("fma")
def _fma(d):
    return _fused(d, d.mods.one_of(*FLOATS))


def _fused(d, kind):
    mode = d.mods.one_of(*ROUNDING, default="rn")
    if kind == "f32":
        return _finish(d, functools.partial(fma32, mode=mode), kind)
    if mode != "rn":
        raise UnsupportedPTX(f".{mode}.{kind}")
    return _finish(d, fma64 if kind == "f64" else _fma_half(kind), kind)


def _divide(d, kind):
    how = d.mods.one_of("approx", "full", *ROUNDING)
    if how == "rn":
        return _finish(d, np.divide, kind)
    if how in ("rz", "rm", "rp") or kind != "f32":
        raise UnsupportedPTX(f".{how}.{kind}")
    return _finish(d, div_approx if how == "approx" else div_full, kind)


@instruction("ex2", "lg2", "sin", "cos", "tanh", "sqrt", "rcp", "rsqrt")
def _function(d):
    kind = d.mods.one_of(*FLOATS)
    how = d.mods.one_of("approx", "rn")
    if (kind == "f64") if how == "approx" else (d.op not in EXACT):
        raise UnsupportedPTX(f".{how}.{kind}")
    return _finish(d, APPROXIMATE[d.op] if how == "approx" else EXACT[d.op], kind)


def _finish(d, f, kind):
    """Adds .ftz, .sat and .relu, and the registers' format."""
    if d.mods.flag("ftz") and kind == "f32":
        f = _then(flush, _of(flush, f))
    if d.mods.flag("sat"):
        f = _then(saturate, f)
    elif d.mods.flag("relu"):
        f = _then(relu, f)
    if kind in ("f32", "f64"):
        return d.apply(_then(canonical, f) if kind == "f32" else f, kind)
    return d.apply(lift(f, kind), "b32" if kind.endswith("x2") else "b16")


def _then(g, f):
    return lambda *xs: g(f(*xs))


def _of(g, f):
    return lambda *xs: f(*map(g, xs))


def _sign(d, kind):
    """abs and neg work on the bits: a NaN keeps its payload."""
    flushed = d.mods.flag("ftz") and kind == "f32"
    if kind in ("f32", "f64"):
        f = np.abs if d.op == "abs" else np.negative
        return d.apply((lambda x: flush(f(x))) if flushed else f, kind)
    bits = "b32" if kind.endswith("x2") else "b16"
    sign = np.uint32(0x80008000) if bits == "b32" else np.uint16(0x8000)
    if d.op == "abs":
        return d.apply(lambda x: x & ~sign, bits)
    return d.apply(lambda x: x ^ sign, bits)


@instruction("copysign")
def _copysign(d):
    """The magnitude of the second operand with the sign of the first."""
    return d.apply(lambda a, b: np.copysign(b, a), d.mods.one_of("f32", "f64"))


TESTS = {
    "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: x == x, "notanumber": np.isnan,
    "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
    "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
}  # fmt: skip


@instruction("testp")
def _testp(d):
    f = TESTS[d.mods.one_of(*TESTS)]
    kind = d.mods.one_of("f32", "f64")
    return apply(f, d.write("pred"), [d.read(1, kind)])
