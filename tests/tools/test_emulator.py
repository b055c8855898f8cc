"""The emulator's instructions against results from hand calculation or other sources: Python's
integers and fractions, numpy's and torch's conversions. The hardware's NaN has the bits 7FFFFFFF.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_emulator.registers import DTYPES
from ptx_emulator.snippet import run

pytestmark = pytest.mark.usefixtures("own_coverage")

INF, NAN = math.inf, math.nan
MIN32, MAX32 = -(2**31), 2**31 - 1
TINY, DENORMAL = 2.0**-126, 2.0**-149

# instruction: kinds of the result and the operands; rows of operands and, last, the result
TABLE = {
    "add.s32": ("s32 s32 s32", (MAX32, 1, MIN32), (-1, 1, 0)),
    "add.sat.s32": ("s32 s32 s32", (MAX32, 1, MAX32), (MIN32, -1, MIN32), (1, 2, 3)),
    "sub.u64": ("u64 u64 u64", (0, 1, 2**64 - 1), (5, 3, 2)),
    "add.s16": ("s16 s16 s16", (32767, 1, -32768)),
    "mul.lo.s32": ("s32 s32 s32", (65536, 65536, 0), (-3, 5, -15), (MIN32, -1, MIN32)),
    "mul.hi.s32": ("s32 s32 s32", (-1, 1, -1), (MIN32, MIN32, 2**30), (65536, 65536, 1)),
    "mul.hi.u32": ("u32 u32 u32", (2**32 - 1, 2**32 - 1, 2**32 - 2), (65536, 65536, 1)),
    "mul.hi.u64": ("u64 u64 u64", (2**64 - 1, 2**64 - 1, 2**64 - 2), (2**32, 2**33, 2)),
    "mul.hi.s64": ("s64 s64 s64", (-1, 1, -1), (-(2**63), -(2**63), 2**62), (-5, 7, -1)),
    "mul.wide.s32": ("s64 s32 s32", (MIN32, MIN32, 2**62), (-1, 1, -1)),
    "mul.wide.u32": ("u64 u32 u32", (2**32 - 1, 2**32 - 1, (2**32 - 1) ** 2)),
    "mul.wide.u16": ("u32 u16 u16", (65535, 65535, 65535**2)),
    "mad.lo.s32": ("s32 s32 s32 s32", (3, 4, 5, 17), (65536, 65536, -1, -1)),
    "mad.wide.s32": ("s64 s32 s32 s64", (-2, 3, 10, 4), (MIN32, MIN32, 1, 2**62 + 1)),
    "mad.hi.u32": ("u32 u32 u32 u32", (2**31, 4, 7, 9)),
    "div.s32": ("s32 s32 s32", (7, -2, -3), (-7, 2, -3), (-7, -2, 3), (MIN32, 1, MIN32),
        (1, 0, -1)),
    "div.u32": ("u32 u32 u32", (2**32 - 1, 2, 2**31 - 1), (1, 0, 2**32 - 1)),
    "div.u64": ("u64 u64 u64", (2**64 - 1, 3, (2**64 - 1) // 3)),
    "rem.s32": ("s32 s32 s32", (7, -2, 1), (-7, 2, -1), (-6, 3, 0)),
    "rem.u32": ("u32 u32 u32", (2**32 - 1, 10, 5)),
    "min.s32": ("s32 s32 s32", (-1, 1, -1)),
    "min.u32": ("u32 u32 u32", (2**32 - 1, 1, 1)),
    "max.s32": ("s32 s32 s32", (-1, 1, 1)),
    "max.u64": ("u64 u64 u64", (2**64 - 1, 1, 2**64 - 1)),
    "abs.s32": ("s32 s32", (-5, 5), (MIN32, MIN32)),
    "neg.s32": ("s32 s32", (MIN32, MIN32), (3, -3)),
    "and.b32": ("b32 b32 b32", (0xF0F0, 0xFF00, 0xF000)),
    "or.b64": ("b64 b64 b64", (1, 2**63, 2**63 + 1)),
    "xor.b16": ("b16 b16 b16", (0xFFFF, 0x0F0F, 0xF0F0)),
    "not.b32": ("b32 b32", (0, 0xFFFFFFFF)),
    "cnot.b32": ("b32 b32", (0, 1), (7, 0)),
    "shl.b32": ("b32 b32 u32", (1, 31, 2**31), (1, 32, 0), (1, 2**32 - 1, 0), (3, 0, 3)),
    "shl.b64": ("b64 b64 u32", (1, 63, 2**63), (1, 64, 0)),
    "shr.s32": ("s32 s32 u32", (-8, 1, -4), (-8, 40, -1), (8, 32, 0)),
    "shr.u32": ("u32 u32 u32", (2**31, 31, 1), (2**31, 32, 0)),
    "shr.u16": ("u16 u16 u32", (0x8000, 15, 1), (0x8000, 16, 0)),
    "shf.l.wrap.b32": ("b32 b32 b32 u32", (0x80000000, 1, 1, 3), (5, 7, 32, 7)),
    "shf.r.wrap.b32": ("b32 b32 b32 u32", (1, 1, 1, 0x80000000), (5, 7, 32, 5)),
    "shf.l.clamp.b32": ("b32 b32 b32 u32", (5, 7, 40, 5)),
    "shf.r.clamp.b32": ("b32 b32 b32 u32", (5, 7, 32, 7), (5, 7, 99, 7)),
    "bfe.u32": ("u32 u32 u32 u32", (0xABCD, 4, 8, 0xBC), (0xFF, 0, 0, 0), (2**31, 31, 8, 1),
        (1, 40, 4, 0)),
    "bfe.s32": ("s32 s32 u32 u32", (0xF0, 4, 4, -1), (0x70, 4, 4, 7), (MIN32, 31, 1, -1),
        (1, 0, 0, 0)),
    "bfe.u64": ("u64 u64 u32 u32", (2**63, 60, 4, 8)),
    "bfe.s64": ("s64 s64 u32 u32", (2**63, 60, 4, -8)),
    "bfi.b32": ("b32 b32 b32 u32 u32", (0xF, 0, 4, 4, 0xF0), (0, 2**32 - 1, 0, 32, 0),
        (1, 2, 5, 0, 2)),
    "bfi.b64": ("b64 b64 b64 u32 u32", (0xFF, 0, 56, 16, 0xFF << 56)),
    "popc.b32": ("u32 b32", (0xFFFFFFFF, 32), (0, 0)),
    "popc.b64": ("u32 b64", (2**64 - 1, 64)),
    "clz.b32": ("u32 b32", (0, 32), (1, 31), (2**31, 0)),
    "clz.b64": ("u32 b64", (1, 63), (0, 64)),
    "brev.b32": ("b32 b32", (1, 2**31), (0x0000F0F0, 0x0F0F0000)),
    "brev.b64": ("b64 b64", (1, 2**63)),
    "bfind.u32": ("u32 u32", (0, 2**32 - 1), (9, 3)),
    "bfind.s32": ("u32 s32", (-1, 2**32 - 1), (-9, 3)),
    "bfind.shiftamt.u32": ("u32 u32", (1, 31)),
    "prmt.b32": ("b32 b32 b32 b32", (0x33221100, 0x77665544, 0x7410, 0x77441100),
        (0x80, 0, 0x0008, 0x808080FF)),
    "slct.s32.s32": ("s32 s32 s32 s32", (1, 2, 0, 1), (1, 2, -1, 2)),
    "slct.f32.f32": ("f32 f32 f32 f32", (1.0, 2.0, -0.0, 1.0), (1.0, 2.0, NAN, 2.0)),
    # float32: ties, overflow, denormals, NaN, signs of zero
    "add.f32": ("f32 f32 f32", (1.0, 2.0**-24, 1.0), (1.0 + 2.0**-23, 2.0**-24, 1.0 + 2.0**-22),
        (INF, -INF, NAN), (3e38, 3e38, INF), (DENORMAL, DENORMAL, 2 * DENORMAL),
        (-0.0, 0.0, 0.0)),
    "add.ftz.f32": ("f32 f32 f32", (DENORMAL, DENORMAL, 0.0), (-DENORMAL, -DENORMAL, -0.0),
        (TINY, -1.5 * TINY, -0.0)),
    "add.rz.f32": ("f32 f32 f32", (1.0, -(2.0**-40), 1 - 2.0**-24), (1.0, 2.0**-24, 1.0)),
    "add.rp.f32": ("f32 f32 f32", (1.0, 2.0**-40, 1 + 2.0**-23)),
    "add.rm.f32": ("f32 f32 f32", (-1.0, -(2.0**-40), -(1 + 2.0**-23))),
    "add.sat.f32": ("f32 f32 f32", (1.0, 1.0, 1.0), (-1.0, 0.5, 0.0), (NAN, 0.0, 0.0)),
    "sub.f32": ("f32 f32 f32", (1.0, 1.0, 0.0), (INF, INF, NAN)),
    "mul.f32": ("f32 f32 f32", (0.0, INF, NAN), (2.0**-100, 2.0**-49, DENORMAL),
        (-1.0, 0.0, -0.0), (2e20, 2e20, INF)),
    "mul.rz.f32": ("f32 f32 f32", (1 + 2.0**-23, 1 + 2.0**-23, 1 + 2.0**-22),
        (2e20, 2e20, 2.0**128 - 2.0**104)),
    "fma.rn.f32": ("f32 f32 f32 f32", (1 + 2.0**-12, 1 + 2.0**-12, -1.0, 2.0**-11 + 2.0**-24),
        (1 + 2.0**-12, 2.0**-12, 2.0**13, 2.0**13), (0.0, INF, 1.0, NAN),
        (2.0**127, 2.0, -(2.0**127), 2.0**127)),
    "mad.rn.f32": ("f32 f32 f32 f32", (2.0, 3.0, 4.0, 10.0)),
    "div.rn.f32": ("f32 f32 f32", (1.0, 0.0, INF), (0.0, 0.0, NAN), (-1.0, INF, -0.0),
        (TINY, 4.0, TINY / 4)),
    "div.approx.f32": ("f32 f32 f32", (1.0, 2.0**127, 0.0), (6.0, 3.0, 2.0)),
    "div.full.f32": ("f32 f32 f32", (6.0, 3.0, 2.0), (1.0, 0.0, INF)),
    "rcp.rn.f32": ("f32 f32", (-0.0, -INF), (4.0, 0.25)),
    "rcp.approx.ftz.f32": ("f32 f32", (DENORMAL, INF), (2.0, 0.5)),
    "sqrt.rn.f32": ("f32 f32", (-1.0, NAN), (-0.0, -0.0), (4.0, 2.0)),
    "sqrt.approx.f32": ("f32 f32", (9.0, 3.0)),
    "rsqrt.approx.f32": ("f32 f32", (4.0, 0.5), (0.0, INF), (INF, 0.0), (-1.0, NAN)),
    "ex2.approx.f32": ("f32 f32", (10.0, 1024.0), (-INF, 0.0), (128.0, INF), (-149.0, DENORMAL)),
    "ex2.approx.ftz.f32": ("f32 f32", (-149.0, 0.0), (NAN, NAN)),
    "lg2.approx.f32": ("f32 f32", (8.0, 3.0), (0.0, -INF), (-1.0, NAN)),
    "tanh.approx.f32": ("f32 f32", (0.0, 0.0), (INF, 1.0)),
    "sin.approx.f32": ("f32 f32", (0.0, 0.0)),
    "cos.approx.f32": ("f32 f32", (0.0, 1.0)),
    "min.f32": ("f32 f32 f32", (NAN, 1.0, 1.0), (NAN, NAN, NAN), (0.0, -0.0, -0.0),
        (-0.0, 0.0, -0.0)),
    "max.f32": ("f32 f32 f32", (1.0, NAN, 1.0), (-0.0, 0.0, 0.0), (0.0, -0.0, 0.0),
        (-INF, 3.0, 3.0)),
    "max.NaN.f32": ("f32 f32 f32", (1.0, NAN, NAN), (1.0, 2.0, 2.0)),
    "abs.f32": ("f32 f32", (-0.0, 0.0), (-2.0, 2.0)),
    "neg.f32": ("f32 f32", (0.0, -0.0)),
    "neg.ftz.f32": ("f32 f32", (DENORMAL, -0.0)),
    "copysign.f32": ("f32 f32 f32", (-1.0, 3.0, -3.0)),
    "add.f64": ("f64 f64 f64", (1.0, 2.0**-53, 1.0)),
    "fma.rn.f64": ("f64 f64 f64 f64", (1 + 2.0**-30, 1 + 2.0**-30, -1.0, 2.0**-29 + 2.0**-60)),
    "div.rn.f64": ("f64 f64 f64", (1.0, 3.0, 1 / 3)),
    "sqrt.rn.f64": ("f64 f64", (2.0, math.sqrt(2))),
    # 16-bit floats, by their bits: 3C00 is 1 in float16, 3F80 in bfloat16
    "add.f16": ("b16 b16 b16", (0x3C00, 0x1000, 0x3C00), (0x7BFF, 0x7BFF, 0x7C00),
        (0x7C00, 0xFC00, 0x7FFF)),
    "mul.f16x2": ("b32 b32 b32", (0x40003C00, 0x40004200, 0x44004200)),
    "fma.rn.f16": ("b16 b16 b16 b16", (0x3C01, 0x3C01, 0xBC02, 0x0010)),
    "fma.rn.bf16": ("b16 b16 b16 b16", (0x3F81, 0x3F81, 0xBF82, 0x3880),
        (0x3F80, 0x3F80, 0x3380, 0x3F80)),
    "fma.rn.bf16x2": ("b32 b32 b32 b32", (0x3F803F80, 0x40004000, 0x3F800000, 0x40404000)),
    "max.bf16x2": ("b32 b32 b32", (0x3F80C000, 0x40003F80, 0x40003F80)),
    "min.NaN.f16": ("b16 b16 b16", (0x7E00, 0x3C00, 0x7FFF)),
    "neg.bf16x2": ("b32 b32", (0x3F80BF80, 0xBF803F80)),
    # conversions
    "cvt.rn.f32.s32": ("f32 s32", (2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4), (-1, -1.0)),
    "cvt.rz.f32.u32": ("f32 u32", (2**32 - 1, 2.0**32 - 256)),
    "cvt.rn.f32.u64": ("f32 u64", (2**40 + 2**16, 2.0**40), (2**40 + 2**16 + 1, 2.0**40 + 2**17),
        (2**63 + 1, 2.0**63)),
    "cvt.rp.f32.s64": ("f32 s64", (2**60 + 1, 2.0**60 + 2.0**37), (-(2**60) - 1, -(2.0**60))),
    "cvt.rn.f64.s64": ("f64 s64", (2**53 + 1, 2.0**53), (2**53 + 3, 2.0**53 + 4)),
    "cvt.rni.s32.f32": ("s32 f32", (2.5, 2), (3.5, 4), (-2.5, -2), (NAN, 0), (3e9, MAX32),
        (-3e9, MIN32)),
    "cvt.rzi.s32.f32": ("s32 f32", (-1.9, -1), (1.9, 1)),
    "cvt.rmi.s32.f32": ("s32 f32", (-1.1, -2)),
    "cvt.rpi.s32.f32": ("s32 f32", (1.1, 2)),
    "cvt.rzi.u32.f32": ("u32 f32", (-1.5, 0), (5e9, 2**32 - 1), (3e9, 3000000000)),
    "cvt.rzi.s64.f64": ("s64 f64", (NAN, -(2**63)), (1e19, 2**63 - 1), (-2.5, -2)),
    "cvt.rzi.u64.f32": ("u64 f32", (2.0**63, 2**63), (-1.0, 0)),
    "cvt.rni.f32.f32": ("f32 f32", (0.5, 0.0), (1.5, 2.0), (-0.2, -0.0)),
    "cvt.sat.f32.f32": ("f32 f32", (2.0, 1.0), (NAN, 0.0)),
    "cvt.rn.f32.f64": ("f32 f64", (1 + 2.0**-24, 1.0), (1 + 2.0**-24 + 2.0**-50, 1 + 2.0**-23)),
    "cvt.ftz.f64.f32": ("f64 f32", (DENORMAL, 0.0)),
    "cvt.f64.f32": ("f64 f32", (DENORMAL, DENORMAL)),
    "cvt.rn.bf16.f32": ("b16 f32", (1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82),
        (NAN, 0x7FFF), (3.4e38, 0x7F80)),
    "cvt.rz.bf16.f32": ("b16 f32", (1 + 3 * 2.0**-8, 0x3F81)),
    "cvt.rn.relu.bf16.f32": ("b16 f32", (-1.0, 0)),
    "cvt.rn.f16.f32": ("b16 f32", (65519.0, 0x7BFF), (65520.0, 0x7C00), (2.0**-25, 0),
        (NAN, 0x7FFF), (-0.0, 0x8000)),
    "cvt.rn.bf16x2.f32": ("b32 f32 f32", (2.0, 1.0, 0x40003F80)),
    "cvt.rn.f16x2.f32": ("b32 f32 f32", (2.0, 1.0, 0x40003C00)),
    "cvt.f32.bf16": ("f32 b16", (0x3F80, 1.0), (0x7FC1, NAN), (1, 2.0**-133)),
    "cvt.f32.f16": ("f32 b16", (1, 2.0**-24)),
    "cvt.rna.tf32.f32": ("b32 f32", (1 + 2.0**-11, 0x3F802000), (1 + 2.0**-12, 0x3F800000)),
    "cvt.s64.s32": ("s64 s32", (-1, -1)),
    "cvt.u64.u32": ("u64 u32", (2**32 - 1, 2**32 - 1)),
    "cvt.s32.s8": ("s32 s32", (0x80, -128), (0x17F, 127)),
    "cvt.u16.u32": ("u16 u32", (0x12345, 0x2345)),
    "cvt.sat.s8.s32": ("s32 s32", (1000, 127), (-1000, -128)),
    "cvt.sat.u32.s32": ("u32 s32", (-5, 0)),
    # comparisons: PTX's ne is ordered, its neu is not
    "setp.eq.f32": ("pred f32 f32", (NAN, NAN, 0), (0.0, -0.0, 1)),
    "setp.ne.f32": ("pred f32 f32", (NAN, 1.0, 0), (1.0, 2.0, 1)),
    "setp.neu.f32": ("pred f32 f32", (NAN, 1.0, 1), (1.0, 1.0, 0)),
    "setp.ltu.f32": ("pred f32 f32", (NAN, 1.0, 1), (2.0, 1.0, 0)),
    "setp.ge.f32": ("pred f32 f32", (NAN, 1.0, 0), (1.0, 1.0, 1)),
    "setp.nan.f32": ("pred f32 f32", (NAN, 1.0, 1), (2.0, 1.0, 0)),
    "setp.num.f32": ("pred f32 f32", (NAN, 1.0, 0)),
    "setp.eq.ftz.f32": ("pred f32 f32", (DENORMAL, 0.0, 1)),
    "setp.lt.s32": ("pred s32 s32", (-1, 1, 1)),
    "setp.lt.u32": ("pred u32 u32", (-1, 1, 0)),
    "setp.hi.u32": ("pred u32 u32", (-1, 1, 1)),
    "setp.ge.s64": ("pred s64 s64", (-1, 1, 0)),
    "setp.ne.b16": ("pred b16 b16", (1, 2, 1)),
    "setp.lt.f16": ("pred b16 b16", (0x8000, 0x3C00, 1)),
    "set.lt.u32.f32": ("u32 f32 f32", (1.0, 2.0, 2**32 - 1), (2.0, 1.0, 0)),
    "set.lt.f32.s32": ("f32 s32 s32", (1, 2, 1.0)),
    "testp.infinite.f32": ("pred f32", (-INF, 1), (1.0, 0)),
    "testp.subnormal.f32": ("pred f32", (DENORMAL, 1), (TINY, 0)),
}  # fmt: skip


def expected_bits(values, kind):
    if kind == "pred":
        return np.array(values, np.uint32)
    dtype = np.dtype(DTYPES[kind])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if dtype.kind != "f":
        return np.array([int(v) & (1 << 8 * dtype.itemsize) - 1 for v in values], unsigned)
    bits = np.array(values, dtype).view(unsigned)
    return np.where(np.isnan(np.array(values, dtype)) & (dtype.itemsize == 4), 0x7FFFFFFF, bits)


@pytest.mark.parametrize("opcode", TABLE)
def test_instruction(opcode):
    kinds, *rows = TABLE[opcode]
    result, *operands = kinds.split()
    *columns, expected = zip(*rows, strict=True)
    names = ", ".join(f"%a{i}" for i in range(len(operands)))
    (actual,) = run(f"{opcode} %d0, {names};", result, *zip(operands, columns, strict=True))
    width = actual.dtype.itemsize
    assert [hex(v) for v in actual.view(f"u{width}")] == [
        hex(v) for v in expected_bits(expected, result)
    ]


def random_floats(seed, n, dtype=np.float32):
    """Random bits; half of the numbers are close in magnitude, so that sums cancel."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    close = (bits & 0x807FFFFF) | (rng.integers(120, 134, n, dtype=np.uint32) << 23)
    return np.where(rng.random(n) < 0.5, bits, close).astype(np.uint32).view(np.float32)


def rounded(exact: Fraction) -> np.float32:
    """Rounds a fraction to float32, to nearest even, in integer arithmetic."""
    if exact == 0:
        return np.float32(0)
    sign, exact = (-1, -exact) if exact < 0 else (1, exact)
    exponent = max(exact.numerator.bit_length() - exact.denominator.bit_length() - 24, -149)
    while exact / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and exact / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    mantissa = round(exact / Fraction(2) ** exponent)
    value = Fraction(mantissa) * Fraction(2) ** exponent
    return np.float32(sign * float(value)) if value < 2**128 else np.float32(sign * INF)


def test_fma_rounds_once():
    """A product and a sum that float64 would round, so that float32 would be rounded twice."""
    a, b, c = (random_floats(seed, 992) for seed in range(3))
    # The exact sum is just beside a tie; float64 rounds it onto the tie
    a[:4], b[:4], c[:4] = 1 + 2.0**-12, 2.0**-12, [2.0**13, -(2.0**13), 2.0**14, 2.0**20]
    a[4:6], b[4:6], c[4:6] = 2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 + 2.0**-23), [DENORMAL, 0]
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    (actual,) = run("fma.rn.f32 %d0, %a0, %a1, %a2;", "f32", ("f32", a), ("f32", b), ("f32", c))
    for x, y, z, w in zip(a, b, c, actual, strict=True):
        exact = rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        assert w == exact, (x, y, z)


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_is_torchs(kind, dtype):
    x = random_floats(5, 1024)
    x = x[~np.isnan(x)]
    (actual,) = run(f"cvt.rn.{kind}.f32 %d0, %a0;", "b16", ("f32", x))
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(actual, expected)


def test_shifts_and_fields_are_pythons():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2**32, 512, dtype=np.uint32)
    pos, length = (rng.integers(0, 40, 512).astype(np.uint32) for _ in range(2))
    body = "bfe.s32 %d0, %a0, %a1, %a2; lop3.b32 %d1, %a0, %a1, %a2, 0x96;"
    field, parity = run(body, "s32 b32", ("u32", a), ("u32", pos), ("u32", length))
    for x, p, n, actual in zip(*(v.tolist() for v in (a, pos, length, field)), strict=True):
        sign = x >> min(p + n - 1, 31) & 1 if n else 0
        bits = [x >> i & 1 if i < 32 else sign for i in range(p, p + n)]
        value = sum(bit << i for i, bit in enumerate(bits)) - (sign << n)
        assert actual == _wrap(value)
    assert np.array_equal(parity, a ^ pos ^ length)


def _wrap(value):
    return (value + 2**31) % 2**32 - 2**31


def test_carry_goes_from_word_to_word():
    low, high = np.array([2**32 - 1, 5], np.uint32), np.array([1, 2], np.uint32)
    body = """
    add.cc.u32 %d0, %a0, 1; addc.u32 %d1, %a1, 0;
    sub.cc.u32 %d2, %a1, %a0; subc.u32 %d3, %a1, 0;
    """
    results = run(body, "u32 u32 u32 u32", ("u32", low), ("u32", high))
    assert [r.tolist() for r in results] == [[0, 6], [2, 2], [2, 2**32 - 3], [0, 1]]


def test_vectors_are_packed_and_unpacked():
    body = """
    { .reg .b16 low, high; mov.b32 {low, high}, %a0; mov.b32 %d0, {high, low}; }
    mov.b64 %d1, {%a0, %d0};
    { .reg .pred q; setp.eq.u32 q, %a0, 0x12345678; @q add.u32 %d0, %d0, 1; @!q mov.u32 %d0, 7; }
    """
    first, both = run(body, "b32 b64", ("u32", [0x12345678, 2]))
    assert [hex(v) for v in first] == ["0x56781235", "0x7"]
    assert [hex(v) for v in both] == ["0x5678123412345678", "0x2000000000002"]


def test_setp_with_two_results_and_a_third_operand():
    body = """
    .reg .pred q; setp.gt.s32 q, %a0, 2;
    setp.lt.and.s32 %d0|%d1, %a0, %a1, !q;
    .reg .pred low, high; .reg .b32 halves; mov.u32 halves, 0x3C004000;
    setp.gt.f16x2 low|high, halves, 0x3E003E00; and.pred %d2, low, q; not.pred %d3, high;
    """
    results = run(body, "pred pred pred pred", ("s32", [0, 2, 3, 9]), ("s32", [1, 1, 9, 1]))
    assert [r.tolist() for r in results] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]
