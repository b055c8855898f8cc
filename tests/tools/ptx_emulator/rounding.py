"""Conversions between numbers and bits: bfloat16 and tf32, directed rounding, and sums that round
once.

float64 holds any product of two float32. But the sum with a third number would be rounded twice, to
float64 and then to float32. `odd` prevents this: it truncates to float64 and sets the last bit if
the sum is inexact, so that the second rounding knows on which side of a tie the exact sum is.
"""

from fractions import Fraction

import numpy as np

NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)  # the NaN of the hardware's arithmetic
NAN16 = np.uint16(0x7FFF)
TINY = np.float32(2.0**-126)  # the smallest normal float32


def canonical(x):
    """Replaces every NaN by the hardware's."""
    nan = x != x
    if nan.any():
        x = np.array(x)
        x[nan] = NAN32
    return x


def flush(x):
    """.ftz: replaces a float32 below the normal range by zero of the same sign."""
    tiny = np.abs(x) < TINY
    if tiny.any():
        x = np.where(tiny, np.copysign(np.float32(0), x), x)
    return x


def two_sum(a, b):
    """a + b as float64, and the error of that sum."""
    s = a + b
    back = s - a
    return s, (a - (s - back)) + (b - back)


def odd(s, error):
    """s + error truncated to float64, with its last bit set if inexact."""
    bits = s.view(np.int64)
    inexact = (error != 0) & np.isfinite(s)
    past = inexact & ((error < 0) == (s > 0)) & (s != 0)  # s was rounded away from zero
    return np.where(inexact, (bits - past) | 1, bits).view(np.float64)


def odd32(x):
    """float64 truncated to float32, with its last bit set if inexact."""
    y = x.astype(np.float32)
    back = y.astype(np.float64)
    bits = y.view(np.int32)
    inexact = (back != x) & (x == x)
    return np.where(inexact, (bits - (np.abs(back) > np.abs(x))) | 1, bits).view(np.float32)


def nearest(x, dtype, mode):
    """float64 to float32 or float16 by a rounding mode: rn rz rm rp."""
    y = x.astype(dtype)
    if mode == "rn":
        return y
    back = y.astype(np.float64)
    if mode == "rz":
        wrong = np.abs(back) > np.abs(x)
        toward = dtype(0)
    elif mode == "rm":
        wrong, toward = back > x, dtype(-np.inf)
    else:
        wrong, toward = back < x, dtype(np.inf)
    return np.where(wrong, np.nextafter(y, toward), y)


def fma32(a, b, c, mode="rn"):
    """a * b + c of float32, rounded once."""
    product = a.astype(np.float64) * b
    s = product + c
    if mode == "rn":
        bits = s.view(np.uint64)
        tie = (bits & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
        small = np.abs(s) < 2 * float(TINY)
        if not (tie | (small & (s != 0))).any():  # else no double rounding is possible
            return s.astype(np.float32)
    s, error = two_sum(product, c.astype(np.float64))
    return nearest(odd(s, error), np.float32, mode)


def fma64(a, b, c):
    """a * b + c of float64, rounded once, with exact fractions if the operands are finite."""
    plain = a * b + c
    out = plain.copy()
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            try:
                out[i] = exact.numerator / exact.denominator  # Python divides integers correctly
            except OverflowError:
                out[i] = np.inf if exact > 0 else -np.inf
    return out


def add32(a, b, mode):
    s, error = two_sum(a.astype(np.float64), b.astype(np.float64))
    return nearest(odd(s, error), np.float32, mode)


def from_bf16(bits):
    """Converts from bfloat16, the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f16(bits):
    return bits.view(np.float16).astype(np.float32)


def unpack(register, kind):
    """The numbers in a register of f16, bf16 or a pair of either, as float32."""
    halves = np.ascontiguousarray(register).view(np.uint16)
    return from_bf16(halves) if kind.startswith("bf") else from_f16(halves)


def pack(numbers, kind):
    """The inverse of unpack: 16-bit words, or 32-bit words of two numbers each."""
    halves = to_bf16(numbers) if kind.startswith("bf") else to_f16(numbers).view(np.uint16)
    return halves.view(np.uint32) if kind.endswith("x2") else halves


def to_bf16(x, mode="rn"):
    """float32 to bfloat16 bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    if mode == "rz":
        out = bits >> np.uint32(16)
    elif mode == "rn":
        out = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
            16
        )
    else:
        up = (x > 0) if mode == "rp" else (x < 0)
        out = (bits + np.where(up, np.uint32(0xFFFF), np.uint32(0))) >> np.uint32(16)
    out = out.astype(np.uint16)
    nan = x != x
    if nan.any():
        out[nan] = NAN16
    return out


def to_f16(x, mode="rn"):
    """float32 or float64 to float16; NaN becomes 0x7FFF."""
    y = x.astype(np.float16) if mode == "rn" else nearest(x.astype(np.float64), np.float16, mode)
    nan = x != x
    if nan.any():
        y.view(np.uint16)[nan] = NAN16
    return y


def to_tf32(x, mode):
    """float32 to the 19 bits of tf32: rna, ties away from zero; rn, to even; rz."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    if mode == "rna":
        out = bits + np.uint32(0x1000)
    elif mode == "rn":
        out = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        out = bits
    out = out & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), out, np.where(x != x, np.uint32(0x7FFFFFFF), bits))
