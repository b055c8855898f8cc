"""The emulator's instructions against results worked out by hand or by other means: Python's
integers and fractions, numpy's and torch's conversions. The hardware's NaN has the bits 7FFFFFFF.
"""

import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
from emulator.registers import DTYPES
from emulator.snippet import HEADER, execute, kernel, run

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
    """Bits drawn at random, half of them near one another in magnitude, so that sums cancel."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    close = (bits & 0x807FFFFF) | (rng.integers(120, 134, n, dtype=np.uint32) << 23)
    return np.where(rng.random(n) < 0.5, bits, close).astype(np.uint32).view(np.float32)


def rounded(exact: Fraction) -> np.float32:
    """A fraction as float32, to nearest even, by integer arithmetic."""
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
    """Also where the product is not a float64's neighbour: a sum in float64 is rounded twice."""
    a, b, c = (random_floats(seed, 992) for seed in range(3))
    # The exact sum lies just off a tie that float64 rounds it onto
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


# The warp


@pytest.mark.parametrize(
    "how, by, clamp, source",
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("down", 4, 31, lambda i: i + 4 if i + 4 < 32 else i),
        ("down", 2, 0x181F, lambda i: i + 2 if i % 8 + 2 < 8 else i),
        ("idx", 9, 31, lambda i: 9),
        ("idx", 1, 0x1C1F, lambda i: i // 4 * 4 + 1),
    ],
)
def test_shfl(how, by, clamp, source):
    x = np.arange(64, dtype=np.uint32) * 3
    value, inside = run(
        f"shfl.sync.{how}.b32 %d0|%d1, %a0, {by}, {clamp}, -1;", "b32 pred", ("u32", x)
    )
    assert value.tolist() == [3 * (i // 32 * 32 + source(i % 32)) for i in range(64)]
    moved = [source(i % 32) != i % 32 for i in range(64)]
    if how in ("up", "down", "bfly"):
        assert inside.tolist() == moved


def test_votes_matches_and_sums():
    body = """
    .reg .pred odd; .reg .b32 bit; and.b32 bit, %a0, 1; setp.ne.u32 odd, bit, 0;
    vote.sync.ballot.b32 %d0, odd, -1; vote.sync.any.pred %d1, odd, -1;
    vote.sync.all.pred %d2, !odd, -1; match.any.sync.b32 %d3, bit, -1;
    redux.sync.add.s32 %d4, %a0, -1; redux.sync.max.u32 %d5, %a0, -1;
    """
    x = np.concatenate([np.arange(32), np.zeros(32)]).astype(np.int32)
    ballot, some, none, match, total, most = run(body, "b32 pred pred b32 s32 u32", ("s32", x))
    assert ballot[0] == 0xAAAAAAAA and ballot[32] == 0
    assert (some[0], some[32], none[0], none[32]) == (1, 0, 0, 1)
    assert match[0] == 0x55555555 and match[1] == 0xAAAAAAAA and match[32] == 0xFFFFFFFF
    assert (total[0], total[32], most[5]) == (496, 0, 31)


@pytest.mark.parametrize(
    "kind, k, shape", [("bf16", 16, "m16n8k16"), ("f16", 16, "m16n8k16"), ("f16", 8, "m16n8k8"),
                       ("tf32", 8, "m16n8k8"), ("tf32", 4, "m16n8k4")]
)  # fmt: skip
def test_mma_is_a_product(kind, k, shape):
    """Fragments dealt out as PTX draws them, element by element."""
    rng = np.random.default_rng(k)
    A, B, C = (
        rng.integers(-9, 9, (16, k)),
        rng.integers(-9, 9, (k, 8)),
        rng.integers(-9, 9, (16, 8)),
    )
    per = 1 if kind == "tf32" else 2

    def bits(x):
        x = np.float32(x)
        if kind == "tf32":
            return int(x.view(np.uint32))
        return int(np.float16(x).view(np.uint16)) if kind == "f16" else int(x.view(np.uint32)) >> 16

    def word(elements):
        return sum(bits(e) << 16 * i for i, e in enumerate(elements))

    a, b, c = ([[] for _ in range(32)] for _ in range(3))
    for lane in range(32):
        g, q = divmod(lane, 4)
        for half in range(k // (4 * per)):
            columns = [half * 4 * per + q * per + i for i in range(per)]
            a[lane] += [word([A[row, j] for j in columns]) for row in (g, g + 8)]
            b[lane].append(word([B[j, g] for j in columns]))
        c[lane] = [float(C[row, 2 * q + i]) for row in (g, g + 8) for i in range(2)]
    names = iter(range(99))
    operands, inputs = [], []
    for kinds, fragment in (("b32", a), ("b32", b), ("f32", c)):
        columns = list(zip(*fragment, strict=True))
        operands.append("{" + ", ".join(f"%a{next(names)}" for _ in columns) + "}")
        inputs += [(kinds, column) for column in columns]
    opcode = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
    body = f"{opcode} {{%d0, %d1, %d2, %d3}}, {', '.join(operands)};"
    d = run(body, "f32 f32 f32 f32", *inputs)
    D = A @ B + C
    for lane in range(32):
        g, q = divmod(lane, 4)
        assert [x[lane] for x in d] == [
            D[g, 2 * q],
            D[g, 2 * q + 1],
            D[g + 8, 2 * q],
            D[g + 8, 2 * q + 1],
        ]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count, trans):
    data = np.arange(32 * 8, dtype=np.uint16)
    out = np.zeros((count, 32), np.uint32)
    names = ", ".join(f"%r{i + 8}" for i in range(count))
    stores = "\n".join(f"st.global.b32 [%x1+{128 * i}], %r{i + 8};" for i in range(count))
    text = kernel(
        f"""
        mul.wide.u32 %x0, %tid, 16; add.s64 %x1, %in0, %x0;
        ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%x1];
        mov.u32 %r4, tile; mad.lo.u32 %r5, %tid, 16, %r4;
        st.shared.v4.b32 [%r5], {{%r0, %r1, %r2, %r3}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r5];
        mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in1, %x0;
        {stores}
        """,
        2, ".shared .align 16 .b8 tile[512];",
    )  # fmt: skip
    execute(text, data, out)
    tiles = data.reshape(4, 8, 8)[:count]
    tiles = tiles.transpose(0, 2, 1) if trans else tiles
    assert np.array_equal(out, np.ascontiguousarray(tiles).view(np.uint32).reshape(count, 32))


def test_atomics_go_in_the_order_of_threads():
    total, order = np.array([100], np.int32), np.zeros(64, np.int32)
    text = kernel(
        "atom.global.add.s32 %r0, [%in0], 2; mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in1, %x0;"
        "st.global.u32 [%x1], %r0; red.global.max.s32 [%in0], %tid;", 2,
    )  # fmt: skip
    execute(text, total, order, block=64)
    assert total[0] == 228 and order.tolist() == list(range(100, 228, 2))


def test_threads_that_part_meet_again():
    """Loops of different lengths, then a shuffle that needs the whole warp."""
    out = np.zeros(64, np.uint32)
    text = kernel(
        """
        mov.u32 %r0, 0; and.b32 %r1, %tid, 7;
        LOOP: setp.eq.u32 %p0, %r1, 0; @%p0 bra DONE;
        add.u32 %r0, %r0, %r1; sub.u32 %r1, %r1, 1; bra LOOP;
        DONE: shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
        mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in0, %x0; st.global.u32 [%x1], %r2;
        """, 1,
    )  # fmt: skip
    counts = execute(text, out, block=64).counts
    triangle = [n * (n + 1) // 2 for n in range(8)]
    assert out.tolist() == [triangle[(i ^ 1) & 7] for i in range(64)]
    assert counts.warp_instructions < counts.thread_instructions < 32 * counts.warp_instructions


def test_a_table_of_branches():
    out = np.zeros(32, np.uint32)
    text = kernel(
        """
        and.b32 %r0, %tid, 1; mov.u32 %r1, 5;
        TABLE: .branchtargets EVEN, ODD;
        brx.idx %r0, TABLE;
        ODD: mov.u32 %r1, 7;
        EVEN: add.u32 %r1, %r1, %tid;
        mul.wide.u32 %x0, %tid, 4; add.s64 %x1, %in0, %x0; st.global.u32 [%x1], %r1;
        """, 1,
    )  # fmt: skip
    execute(text, out)
    assert out.tolist() == [i + (7 if i & 1 else 5) for i in range(32)]


def test_barrier_that_reduces():
    out = np.zeros(3, np.uint32)
    text = kernel(
        """
        setp.lt.u32 %p0, %tid, 40; setp.lt.u32 %p1, %tid, 99; setp.eq.u32 %p5, %tid, 63;
        bar.red.popc.u32 %r0, 0, %p0; bar.red.and.pred %p2, 0, %p0; bar.red.or.pred %p3, 0, !%p1;
        selp.b32 %r1, 1, 0, %p2; selp.b32 %r2, 1, 0, %p3;
        @!%p5 bra END;
        st.global.u32 [%in0], %r0; st.global.u32 [%in0+4], %r1; st.global.u32 [%in0+8], %r2;
        END:
        """, 1,
    )  # fmt: skip
    execute(text, out, block=64)
    assert out.tolist() == [40, 0, 0]


def test_every_state_space_through_a_generic_address():
    """A thread's address is in local, shared, constant or global memory, by its number."""
    data, out = np.array([1000], np.uint32), np.zeros(32, np.uint32)
    text = kernel(
        """
        add.u32 %r0, %tid, 100;
        mov.u64 %x0, depot; cvta.local.u64 %x1, %x0; st.local.u32 [%x0], %r0;
        mov.u64 %x2, tile; cvta.shared.u64 %x3, %x2;
        setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [tile], 500; bar.sync 0;
        mov.u64 %x4, table; ld.const.u32 %r1, [table+4];
        and.b32 %r2, %tid, 3;
        setp.eq.u32 %p1, %r2, 1; setp.eq.u32 %p2, %r2, 2; setp.eq.u32 %p3, %r2, 3;
        selp.b64 %x5, %x3, %x1, %p1; selp.b64 %x5, %x4, %x5, %p2; selp.b64 %x5, %in0, %x5, %p3;
        ld.u32 %r3, [%x5]; add.u32 %r3, %r3, %r1;
        mul.wide.u32 %x6, %tid, 4; add.s64 %x7, %in1, %x6; st.u32 [%x7], %r3;
        """, 2, ".local .align 8 .b8 depot[8]; .shared .align 4 .b8 tile[4];",
        ".const .align 4 .u32 table[2] = {7, 0x10000};",
    )  # fmt: skip
    execute(text, data, out)
    expected = [[100 + i, 500, 7, 1000][i & 3] + 0x10000 for i in range(32)]
    assert out.tolist() == expected


def test_a_struct_by_value_and_sizes_of_the_grid():
    text = (
        HEADER
        + """
    .visible .entry k(.param .align 8 .b8 k_param_0[24], .param .u64 .ptr .align 1 k_param_1)
    {
        .reg .b32 %r<9>; .reg .b64 %x<9>;
        ld.param.u64 %x0, [k_param_1]; mov.b64 %x1, k_param_0; ld.param.v2.u32 {%r0, %r1}, [%x1+8];
        mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %ctaid.x;
        mad.lo.s32 %r5, %r2, %r3, %r4; mov.u32 %r6, %ntid.x; mov.u32 %r7, %tid.x;
        mad.lo.s32 %r5, %r5, %r6, %r7; mad.lo.s32 %r0, %r0, %r5, %r1;
        mul.wide.u32 %x2, %r5, 4; add.s64 %x2, %x0, %x2; st.global.u32 [%x2], %r0;
    }"""
    )
    out = np.zeros(5 * 3 * 40, np.uint32)
    struct = np.array([0, 3, 11, 0], np.uint64)[:3].copy()
    struct.view(np.uint32)[2:4] = 3, 11
    emulator.launch(
        emulator.Module(text), "k", (5, 3), (40,), [struct.tobytes(), out.ctypes.data],
        emulator.Memory.of(out),
    )  # fmt: skip
    assert out.tolist() == [3 * i + 11 for i in range(out.size)]


def test_bank_conflicts_are_counted():
    def conflicts(stride):
        text = kernel(f"mul.lo.u32 %r0, %tid, {stride}; st.shared.u32 [%r0], %tid;", 0,
                      ".shared .align 16 .b8 tile[8192];")  # fmt: skip
        return execute(text, banks=True).counts.bank_conflicts

    assert [conflicts(stride) for stride in (4, 8, 128, 132)] == [0, 1, 31, 0]


def test_coverage_tells_what_has_not_run():
    text = kernel("setp.gt.u32 %p0, %tid, 99; @%p0 bra SKIP; bra END; SKIP: mov.u32 %r0, 1; END:")
    execute(text)
    coverage, key = emulator.coverage, ("k", emulator.Module(text).hash)
    assert [row[1] for row in coverage.missed(*key)] == ["mov.u32 %r0, 1"]
    saved = coverage.to_json()
    coverage.clear()
    coverage.merge(saved)
    assert [row[1] for row in coverage.missed(*key)] == ["mov.u32 %r0, 1"]
    assert "of 6 instructions" in coverage.report() and "mov.u32 %r0, 1" in coverage.report()


# Devices

TRITON_SCRIPT = """
import torch
from emulator import triton_device
from gpt2.kernels.triton import gelu
x = torch.randn(3001)
with triton_device.active() as device:
    y = gelu.gelu_fwd(x)
torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))
assert [launch.kernel.name for launch in device.launches] == ["_gelu_fwd_kernel"]
"""


def test_triton_launches_run_on_the_emulator():
    """In a process of its own: this one may have imported triton as an interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    subprocess.run([sys.executable, "-c", TRITON_SCRIPT], env=environment, check=True)


CUDA_SOURCE = """
#include <cuda_runtime.h>
__global__ void add_one(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + 1.0f;
}
extern "C" const char* run(const float* x, float* y, int n) {
  add_one<<<(n + 127) / 128, 128>>>(x, y, n);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
"""


@pytest.mark.no_poison
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_launches_run_on_the_emulator(tmp_path):
    import ctypes

    from emulator.cuda_device import EmulatedDevice

    (tmp_path / "toy.cu").write_text(CUDA_SOURCE)
    flags = "-cudart none -gencode arch=compute_80,code=compute_80 --keep -shared -Xcompiler -fPIC"
    subprocess.run(["nvcc", *flags.split(), "toy.cu", "-o", "toy.so"], cwd=tmp_path, check=True)
    with EmulatedDevice() as device:
        library = device.load(tmp_path / "toy.so", [(tmp_path / "toy.ptx").read_text()])
        library.run.restype = ctypes.c_char_p
        library.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        x, y = torch.randn(300), torch.empty(300)
        assert library.run(x.data_ptr(), y.data_ptr(), 300) is None
        assert torch.equal(y, x + 1)
        fresh = torch.empty(300)
        assert b"nobody has written" in library.run(fresh.data_ptr(), y.data_ptr(), 300)
        assert b"load of 4 bytes at byte 1200" in library.run(x.data_ptr(), y.data_ptr(), 301)
        assert b"launch has no" not in library.run(x.data_ptr(), y.data_ptr() + 4, 300)
        known = len(device.memory().allocations)
        del fresh, x
        assert len(device.memory().allocations) == known - 2
    assert [f.kind for f in device.findings] == ["uninitialised", "bounds", "bounds"]
    assert len(device.launches) == 1
    before = len(device.memory().allocations)
    z = torch.ones(300)  # of no interest to it any more
    assert len(device.memory().allocations) == before and z.sum() == 300


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch was built without oneDNN"
)
def test_bare_pointers_go_back_to_where_they_came_from():
    """oneDNN keeps pointers without their deleters, null ones among them."""
    from emulator.cuda_device import EmulatedDevice

    x, weight = torch.randn(1, 1), torch.randn(64, 1)
    with EmulatedDevice() as device:
        known = len(device.memory().allocations)
        for _ in range(3):
            y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        assert len(device.memory().allocations) == known + 1
    assert torch.allclose(y, x @ weight.t(), atol=1e-5)
    del y
    assert len(device.memory().allocations) == known
