"""Promotion, broadcasting, overflow and types around the operations.

An operation on a 32 x 32 tile takes numpy 2 us, and Triton's layers around it 100. Most of that
goes into types, which are created here once per shape, and into operands of equal types, which need
no promotion and which numpy broadcasts by itself.
"""

import functools
import math
import operator

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from .floats import TensorHandle, np_dtype_of

EXACT = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
DTYPE_EQ = tl.dtype.__eq__


class Semantic(TritonSemantic):
    def binary_op_sanitize_overflow_impl(self, lhs, rhs, binary_op):
        """The extremes of the operands bound the result; it is computed exactly only if they exceed
        int32."""
        dtype = lhs.type.scalar
        if not dtype.is_int_signed() or dtype.int_bitwidth >= 64:
            return
        op, a, b = EXACT[binary_op.__name__], lhs.handle.data, rhs.handle.data
        low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
        corners = [op(int(x), int(y)) for x in (a.min(), a.max()) for y in (b.min(), b.max())]
        if low <= min(corners) and max(corners) <= high:
            return
        exact = op(a.astype(np.int64), b.astype(np.int64))
        if exact.min() < low or exact.max() > high:
            worst = exact.flat[np.abs(exact).argmax()]
            raise self.builder.launch.fault(f"{binary_op.__name__} overflows {dtype}: {worst}")

    def load(self, ptr, mask, other, *options):
        # Triton tests `if other`, which is false for a scalar zero
        self.builder.zero_fill = other is not None
        return super().load(ptr, mask, other, *options)

    def binary_op_type_checking_impl(self, lhs, rhs, *flags, **options):
        """If no type changes, operands get the shape of the result and keep their data."""
        left, right = self._constant(lhs, rhs), self._constant(rhs, lhs)
        if not _settled(left, right, *flags, **options):
            return super().binary_op_type_checking_impl(lhs, rhs, *flags, **options)
        a, b = _shape(left.type), _shape(right.type)
        if a != b:
            shape = _broadcast_shape(a, b)
            if a != shape:
                left = tl.tensor(left.handle, tl.block_type(left.dtype, shape))
            if b != shape:
                right = tl.tensor(right.handle, tl.block_type(right.dtype, shape))
        return left, right

    def _constant(self, x, other):
        """A Python number, if it takes the type of the tensor beside it."""
        dtype = getattr(other, "dtype", None)
        if type(x) is float and dtype is tl.float32:
            return self.scalar_constant(x, dtype)
        if type(x) is int and dtype in (tl.int32, tl.int64) and abs(x) < 2**31:
            return self.scalar_constant(x, dtype)
        return x

    def broadcast_impl_value(self, lhs, rhs):
        a, b = _shape(lhs.type), _shape(rhs.type)
        if a == b:
            return lhs, rhs
        shape = _broadcast_shape(a, b)
        return _broadcast(lhs, a, shape), _broadcast(rhs, b, shape)


def _settled(
    lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
):
    """Whether Triton would keep the types of both operands."""
    if not (isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)):
        return False
    a, b = lhs.dtype, rhs.dtype
    if a.is_ptr():
        return allow_lhs_ptr and b.is_int()
    if b.is_ptr():
        return allow_rhs_ptr and a.is_int()
    return a == b and not (div_or_mod and a.primitive_bitwidth == 16)


def _broadcast(x, shape, new_shape):
    if shape == new_shape:
        return x
    handle = TensorHandle(np.broadcast_to(x.handle.data, new_shape), x.dtype)
    return tl.tensor(handle, tl.block_type(x.dtype, new_shape))


_broadcast_shape = functools.cache(np.broadcast_shapes)


def _shape(type):
    return getattr(type, "sizes", ())  # of a block; a scalar has none


@functools.cache
def _block_shape(sizes):
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    sizes = tuple(map(tl.core._unwrap_if_constexpr, sizes))
    shape = tl.tuple(sizes)
    return sizes, shape, tl.core.validate_block_shape(shape)


@functools.cache
def _tensor_shape(sizes):
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_block_type(self, element_ty, shape):
    self.element_ty = element_ty
    shape = shape.values if isinstance(shape, tl.tuple) else shape
    self.sizes, self.shape, self.numel = _block_shape(tuple(shape))


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensor_shape(_shape(type))


def _init_handle(self, data, dtype, attr=None):
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def _dtype_eq(self, other):
    if type(other) is tl.dtype:
        return self is other or self.name == other.name
    return DTYPE_EQ(self, other)


def install():
    tl.block_type.__init__ = _init_block_type
    tl.block_type.name = property(lambda block: f"<{block.shape}, {block.element_ty}>")
    tl.dtype.__eq__ = _dtype_eq
    tl.tensor.__init__ = _init_tensor
    stock.TensorHandle.__init__ = _init_handle
    stock._get_np_dtype = np_dtype_of
