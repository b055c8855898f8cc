"""The operations: arithmetic with the hardware's rounding, and checked memory accesses."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from .floats import TensorHandle, fp32_to_tf32, narrow, np_dtype_of, undefined, widen

MIN_DOT = 16  # every side of a tl.dot: smallest tile of the matrix instructions
TF32 = stock._ir.INPUT_PRECISION.TF32


def _is_fp8(*handles_or_types):
    return any(getattr(x, "dtype", x).scalar.is_fp8() for x in handles_or_types)


class Builder(stock.InterpreterBuilder):
    launch = None  # the running memory.Launch
    zero_fill = False  # whether a masked lane reads zero; else it is undefined

    # Arithmetic. Triton's lambdas (create_fadd, create_exp, ...) end in these few.

    def unary_op(self, arg, op):
        return narrow(op(widen(arg)), arg.dtype)

    def binary_op(self, lhs, rhs, op):
        values = op(widen(lhs), widen(rhs))
        return narrow(values, tl.int1 if values.dtype == np.bool_ else lhs.dtype)

    def create_select(self, condition, lhs, rhs):
        return TensorHandle(np.where(condition.data, lhs.data, rhs.data), rhs.dtype.scalar)

    def create_clampf(self, arg, low, high, propagate_nans):
        return narrow(np.clip(widen(arg), widen(low), widen(high)), arg.dtype)

    def create_fma(self, x, y, z):
        x, y, values = widen(x), widen(y), widen(z)
        wide = np.float32 if values.dtype == np.float16 else np.float64
        return narrow(x.astype(wide) * y + values, z.dtype)

    def create_rsqrt(self, arg):
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_maxnumf(self, lhs, rhs):  # max.f32: the operand that is not NaN
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_fp8(a, b):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        x, y = widen(a), widen(b)
        if x.dtype.kind == "i":
            x, y = x.astype(np.int32), y.astype(np.int32)
        elif x.dtype == np.float16:
            x, y = x.astype(np.float32), y.astype(np.float32)
        elif a.dtype.scalar == tl.float32 and input_precision == TF32:
            x, y = fp32_to_tf32(x), fp32_to_tf32(y)
        return narrow(np.matmul(x, y) + widen(d), d.dtype)

    # Types and shapes.

    def get_bf16(self, value):
        return narrow(np.array([value], np.float32), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        if _is_fp8(src, dst_type):
            return super().cast_impl(src, dst_type)
        return narrow(widen(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_fp8(src, dst_type):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        raise NotImplementedError(f"rounding {rounding_mode} from {src.dtype} to {dst_type}")

    def create_expand_dims(self, arg, axis):
        return TensorHandle(arg.data[(slice(None),) * axis + (None,)], arg.dtype)

    # Memory.

    def create_load(self, ptr, cache, eviction, is_volatile):
        return self.create_masked_load(ptr, None, None, cache, eviction, is_volatile)

    def create_masked_load(self, ptrs, mask, other, cache, eviction, is_volatile):
        dtype = ptrs.get_element_ty()
        np_dtype = np_dtype_of(dtype)
        lanes = self._watch("load", ptrs, mask, np_dtype.itemsize)
        if other is not None:
            fill = other.data
        elif self.zero_fill or mask is None:
            fill = np.zeros(ptrs.data.shape, np_dtype)
        else:
            fill = undefined(ptrs.data.shape, dtype)
        return TensorHandle(stock._interpreter.load(ptrs.data, lanes, fill, np_dtype), dtype)

    def create_store(self, ptr, val, cache, eviction):
        return self.create_masked_store(ptr, val, None, cache, eviction)

    def create_masked_store(self, ptrs, value, mask, cache, eviction):
        itemsize = np_dtype_of(ptrs.get_element_ty()).itemsize
        assert value.data.itemsize == itemsize, (value.data.dtype, ptrs.get_element_ty())
        lanes = self._watch("store", ptrs, mask, itemsize)
        return stock._interpreter.store(ptrs.data, value.data, lanes)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        self._watch("atomic", ptr, mask, val.data.itemsize)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        self._watch("atomic", ptr, None, val.data.itemsize)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def _watch(self, action, ptrs, mask, itemsize):
        """Checks an access and returns its lanes (block pointers pass a bare array)."""
        lanes = mask.data if isinstance(mask, TensorHandle) else mask
        self.launch.check(action, ptrs.data, lanes, itemsize)
        return np.ones(ptrs.data.shape, np.bool_) if lanes is None else lanes


class _Numbers:
    """Reduces and scans numbers instead of the bits of bfloat16."""

    def apply(self, input):
        if not isinstance(input, tuple):
            return self.apply((input,))[0]
        results = super().apply(tuple(_recast(x, tl.bfloat16, tl.float32) for x in input))
        rounds = [x.dtype == tl.bfloat16 for x in input]
        return tuple(
            _recast(y, tl.float32, tl.bfloat16) if r else y
            for y, r in zip(results, rounds, strict=True)
        )


class Reduce(_Numbers, stock.ReduceOps):
    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}  # no warning for all NaN
        return super().min_max(input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)


class Scan(_Numbers, stock.ScanOps):
    pass


def _recast(x, source, target):
    if x.dtype != source:
        return x
    type = x.type.with_element_ty(target) if x.type.is_block() else target
    return tl.tensor(narrow(widen(x.handle), target), type)
