"""bfloat16 in numpy, which has no such type: stored as bits, computed as float32."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

UINT16, UINT64 = np.dtype(np.uint16), np.dtype(np.uint64)
TensorHandle = stock.TensorHandle

NP_DTYPES = {
    dtype.name: stock._get_np_dtype(dtype)
    for dtype in vars(tl).values()
    if type(dtype) is tl.dtype and dtype != tl.void
}


def np_dtype_of(dtype):
    """The numpy dtype of Triton's type: uint64 for pointers, uint16 (the bits) for bfloat16."""
    dtype = dtype.scalar
    return UINT64 if dtype.is_ptr() else NP_DTYPES[dtype.name]


def bf16_to_fp32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values):
    """Rounds to nearest, ties to even; overflow gives inf, NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded = np.where(nan, (bits >> 16) | 0x40, rounded)
    return rounded.astype(np.uint16)


def fp32_to_tf32(values):
    """Clears the low 13 bits of a float32, which the tensor cores ignore."""
    return (values.view(np.uint32) & 0xFFFFE000).view(np.float32)


def widen(handle):
    """The numbers of a handle: its data, or the float32 values of bfloat16's bits."""
    data = handle.data
    if data.dtype == UINT16 and handle.dtype.scalar == tl.bfloat16:
        return bf16_to_fp32(data)
    return data


def narrow(values, dtype):
    """Numbers as a handle of Triton's type `dtype`, rounded once."""
    dtype = dtype.scalar
    if dtype == tl.bfloat16:
        return TensorHandle(fp32_to_bf16(values), dtype)
    return TensorHandle(values.astype(np_dtype_of(dtype), copy=False), dtype)


def undefined(shape, dtype):
    """A visible value for undefined data: NaN, or bytes of 0x5A."""
    np_dtype = np_dtype_of(dtype)
    if dtype.is_floating() and not dtype.is_fp8():
        return np.broadcast_to(narrow(np.array([np.nan]), dtype).data, shape)
    return np.broadcast_to(np.frombuffer(b"\x5a" * np_dtype.itemsize, np_dtype), shape)
