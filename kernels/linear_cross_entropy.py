"""The head and the loss together, chunk by chunk, so that the logits never exist as a whole.

    logits = x weight^T    losses = lse(logits) - logits[target]
    dlogits = softmax - onehot    dx = dlogits weight    dweight = dlogits^T x

A chunk of rows goes through all five steps before the next begins: its logits become their own
gradient in place. The products are PyTorch's; a backend brings the row kernel. Gradients are taken
in the forward, for a loss gradient of 1, and scaled in the backward: dlogits would otherwise have
to be computed again, or kept. Unscaled they also stay clear of float16's underflow. Losses with a
gradient each (reduction "none") cannot be scaled afterwards, as dweight sums over rows: their
backward goes through the chunks again.

    N rows   C features   V vocabulary   V_padded: V, on a GPU rounded up to whole 128-byte
    lines of logits
"""

import torch
from torch import Tensor

from .product import onednn_multiplies, times_transposed

MAX_CHUNK = 8192  # rows; larger products gain nothing


def linear_cross_entropy_fwd(
    row_kernel,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    need_dx: bool,
    need_dweight: bool,
    *,
    align: int = 64,
    tile: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (N,) float32, and the gradients of their sum: dx (N, C) in x's dtype and dweight
    (V, C) float32; each has no rows where it is not needed. float64 stays float64.

    row_kernel is the backend's module: it has cross_entropy_fwd and cross_entropy_fwd_bwd_.
    """
    V = weight.shape[0]
    losses = torch.empty(len(x), dtype=_accumulator(x), device=x.device)

    def gradient_of(chunk, part):
        if need_dx or need_dweight:
            losses[part] = row_kernel.cross_entropy_fwd_bwd_(
                chunk, targets[part], ignore_index, smoothing, V
            )
        else:
            losses[part], _ = row_kernel.cross_entropy_fwd(
                chunk[:, :V], targets[part], ignore_index, smoothing
            )

    return losses, *_through_chunks(gradient_of, x, weight, need_dx, need_dweight, align, tile)


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
    *,
    align: int = 64,
    tile: int = 64,
) -> tuple[Tensor, Tensor]:
    """dx and dweight, as of linear_cross_entropy_fwd, for the gradients dlosses (N,) of the losses.

    row_kernel has cross_entropy_fwd and cross_entropy_bwd_.
    """
    V = weight.shape[0]

    def gradient_of(chunk, part):
        options = ignore_index, smoothing
        logits = chunk[:, :V]
        _, stats = row_kernel.cross_entropy_fwd(logits, targets[part], *options)
        row_kernel.cross_entropy_bwd_(dlosses[part], logits, targets[part], stats, *options)
        chunk[:, V:] = 0

    return _through_chunks(gradient_of, x, weight, need_dx, need_dweight, align, tile)


def _through_chunks(gradient_of, x, weight, need_dx, need_dweight, align, tile):
    """dx and dweight; gradient_of(chunk, part) turns the logits of a chunk, rows `part` of x, into
    their gradient, in place."""
    (N, C), V = x.shape, weight.shape[0]
    # On a GPU an odd vocabulary (50257) misaligns every row of the product: pad it with zero rows.
    # The copy is the cast to x's dtype that autocast needs anyway.
    V_padded = -(-V // align) * align
    padded = weight
    if V_padded != V or weight.dtype != x.dtype:
        padded = x.new_zeros((V_padded, C))
        padded[:V] = weight
    dx = torch.empty((N if need_dx else 0, C), dtype=x.dtype, device=x.device)
    dweight_shape = (V_padded if need_dweight else 0, C)
    dweight = (torch.empty if N else torch.zeros)(
        dweight_shape, dtype=_accumulator(x), device=x.device
    )
    rows = chunk_rows(N, tile)
    logits = x.new_empty((0 if onednn_multiplies(x, padded) else rows, V_padded))
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        chunk = None  # the last one's memory, if it was its own, goes first
        chunk = times_transposed(x[part], padded, out=logits[: part.stop - start])
        gradient_of(chunk, part)
        if need_dx:
            torch.mm(chunk, padded, out=dx[part])
        if need_dweight:
            _add_mm(dweight, chunk.t(), x[part], first=start == 0)
    return dx, dweight[:V]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def chunk_rows(N: int, tile: int = 64) -> int:
    """Rows per chunk: at most an eighth of the logits exists at a time, rounded up to whole tiles
    of rows, which a matrix product needs to be fast."""
    eighth = -(-N // 8)
    return max(1, min(N, MAX_CHUNK, -(-eighth // tile) * tile))


def _add_mm(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b for the first chunk; half precision's product is summed in
    float32: chunks add up without rounding in between."""
    if a.is_cuda and a.dtype != total.dtype:
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)
