"""A Triton kernel that copies, with and without masks, perhaps beyond its tensors."""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr,
                 MASK_STORE: tl.constexpr):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK_LOAD:
        x = tl.load(x_ptr + offs + shift, mask=offs < n, other=0.0)
    else:
        x = tl.load(x_ptr + offs + shift)
    if MASK_STORE:
        tl.store(out_ptr + offs, x, mask=offs < n)
    else:
        tl.store(out_ptr + offs, x)


def copy(x, out, n, shift=0, load=True, store=True):
    _copy_kernel[(triton.cdiv(n, 32),)](
        x, out, n, shift, BLOCK=32, MASK_LOAD=load, MASK_STORE=store
    )
