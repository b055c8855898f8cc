"""The head and the loss together, chunk by chunk, so that the logits never exist as a whole.

    logits = x weight^T    losses = lse(logits) - logits[target]
    dlogits = softmax - onehot    dx = dlogits weight    dweight = dlogits^T x

All five steps are done for a chunk of rows before the next chunk; its gradient overwrites its
logits. PyTorch computes the matrix products; a backend supplies the row kernel. The forward
computes the gradients, for a loss gradient of 1, and the backward only scales them. Otherwise
dlogits would have to be stored, or computed again. Unscaled gradients also avoid underflow in
float16. With reduction "none", each row has its own loss gradient. dweight sums over rows and
cannot be scaled afterwards, so the backward then goes through the chunks again.

    N rows   C features   V vocabulary   V_padded: V, on a GPU rounded up to whole 128-byte
    lines of logits
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .matmul import matmul_transposed, prefers_onednn

MAX_CHUNK = 8192  # rows; a larger matrix product is not faster
# Whether addmm with out_dtype adds 16-bit products to float32: at first it refused that
# (pytorch/pytorch#167931).
ADDS_TO_FLOAT32 = torch.__version__ >= (2, 11)


class Chunks(NamedTuple):
    """A backend's layout of a chunk of logits, and the precision of its products."""

    align: int = 64  # V is padded to a multiple of this
    tile: int = 64  # the rows of a chunk are a multiple of this
    least: int = 4096  # rows of a chunk, if x has as many
    wide: bool = False  # compute products in float32, and round afterwards


DEFAULT = Chunks()


def linear_cross_entropy_fwd(
    row_kernel,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    need_dx: bool,
    need_dweight: bool,
    chunks: Chunks = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (N,) float32, and the gradients of their sum: dx (N, C) in x's dtype, and dweight
    (V, C) float32. float64 stays float64. A gradient that is not needed has no rows.

    row_kernel is the backend's module, with cross_entropy_fwd and cross_entropy_fwd_bwd_.
    """
    V = weight.shape[0]
    losses = []

    def gradient_of(chunk, part):
        options = _rows(targets, part), ignore_index, smoothing
        if need_dx or need_dweight:
            losses.append(row_kernel.cross_entropy_fwd_bwd_(chunk, *options, V))
        else:
            losses.append(row_kernel.cross_entropy_fwd(chunk[:, :V], *options)[0])

    dx, dweight = _through_chunks(gradient_of, x, weight, need_dx, need_dweight, chunks)
    if not losses:
        losses.append(torch.empty(0, dtype=_accumulator(x), device=x.device))
    return losses[0] if len(losses) == 1 else torch.cat(losses), dx, dweight


def linear_cross_entropy_bwd(
    row_kernel,
    x: Tensor,
    weight: Tensor,
    dlosses: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    need_dx: bool,
    need_dweight: bool,
    chunks: Chunks = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """dx and dweight, as from linear_cross_entropy_fwd, given the gradients dlosses (N,).

    row_kernel is the backend's module, with cross_entropy_fwd and cross_entropy_bwd_.
    """
    V = weight.shape[0]

    def gradient_of(chunk, part):
        options = ignore_index, smoothing
        logits = chunk[:, :V]
        _, stats = row_kernel.cross_entropy_fwd(logits, targets[part], *options)
        row_kernel.cross_entropy_bwd_(dlosses[part], logits, targets[part], stats, *options)
        chunk[:, V:].zero_()

    return _through_chunks(gradient_of, x, weight, need_dx, need_dweight, chunks)


def _through_chunks(gradient_of, x, weight, need_dx, need_dweight, chunks):
    """dx and dweight. gradient_of(chunk, part) replaces the logits of a chunk, for the rows `part`
    of x, by their gradient, in place."""
    (N, C), V = x.shape, weight.shape[0]
    # On a GPU an odd vocabulary (50257) would misalign every row of the product, so the weight is
    # padded with zero rows. The copy also does the cast to x's dtype that autocast needs.
    V_padded = -(-V // chunks.align) * chunks.align
    padded = weight
    if V_padded != V or weight.dtype != x.dtype:
        padded = x.new_empty((V_padded, C))
        padded[:V] = weight
        padded[V:].zero_()  # "= 0" would copy a tensor that no recording knows
    dx = torch.empty((N if need_dx else 0, C), dtype=x.dtype, device=x.device)
    dweight_shape = (V_padded if need_dweight else 0, C)
    dweight = (torch.empty if N else torch.zeros)(
        dweight_shape, dtype=_accumulator(x), device=x.device
    )
    rows = chunk_rows(N, chunks)
    own = prefers_onednn(_rows(x, slice(rows)), padded)  # then each chunk has memory of its own
    logits = None if own else x.new_empty((rows, V_padded))
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        chunk = None  # frees the previous chunk's first
        x_part = _rows(x, part)
        out = None if own else _rows(logits, slice(part.stop - start))
        chunk = matmul_transposed(x_part, padded, out)
        gradient_of(chunk, part)
        if need_dx:
            torch.mm(chunk, padded, out=_rows(dx, part))
        if need_dweight:
            _add_mm(dweight, chunk.t(), x_part, first=start == 0)
    return dx, _rows(dweight, slice(V))


def _rows(x: Tensor, part: slice) -> Tensor:
    """x[part] for a slice of rows that starts at one of them. All rows are x itself, because a view
    costs the host a microsecond."""
    return x if not part.start and part.stop == len(x) else x[part]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def chunk_rows(N: int, chunks: Chunks = DEFAULT) -> int:
    """The number of rows per chunk: an eighth of N, rounded up to whole tiles for a fast matrix
    product, at least chunks.least and at most MAX_CHUNK.

    Each chunk but the first reads and writes all of dweight once more, 310 MB for GPT-2.
    """
    eighth = -(-N // (8 * chunks.tile)) * chunks.tile
    return max(1, min(N, MAX_CHUNK, max(eighth, chunks.least)))


def _add_mm(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b for the first chunk. Chunks in half precision are summed in
    float32, without rounding in between."""
    if not a.is_cuda or a.dtype == total.dtype:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif ADDS_TO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
