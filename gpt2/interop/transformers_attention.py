"""Our causal attention in transformers, as attn_implementation="gpt2_kernels".

transformers calls two functions registered under that name: mask, once per forward pass, and
attention, in each layer, with q, k, v and the result of mask.

    mask           None: query i sees every key up to i + Tk - Tq, as in the kernels; else
                   (B, 1, Tq, Tk) bool, True where a query sees a key
    attention      uses the kernels if the mask is a span mask, else PyTorch, with a warning once

In a span mask, each sequence has one span of keys. A query inside the span sees its keys up to
itself; a query outside is padding and sees nothing. Padding on either side and the empty end of a
static cache give span masks. This is decided from the values of the mask, no matter where it comes
from, so no other mask (packed sequences, sliding windows, prefixes) can be mistaken for one.
Sequences whose spans begin at the same key share one call of the kernels, on views. The output is
zero at padding, like FlashAttention's in transformers, so the labels must be -100 there.

    B batch   T time (Tq queries, Tk keys)   H heads   D head size
"""

import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import output_capturing
from transformers.utils.import_utils import is_tracing

from .. import kernels
from ..errors import InputError
from ..kernels.tracing import untraced

NAME = "gpt2_kernels"
_SPANS = "gpt2_kernels_spans"  # attribute of a mask that caches the result of spans_of
_said: set[str] = set()
_UNKNOWN = ("position_bias", "softcap", "s_aux", "cache")  # arguments that change the result


def register() -> None:
    """Implements interop.register_attention."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# ---- who sees whom


def mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,  # (B, up to Tk) bool, False where there is padding
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask of a forward pass, as the head of the file describes. Queries begin at position
    q_offset in the sequence, keys at kv_offset.

    Every mask that is not plainly causal is materialized, even if SDPA would need only a flag.
    """
    _check_model(kwargs.get("config"))
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if allow_is_causal_skip and mask_function is causal_mask_function:
        aligned = q_offset + q_length == kv_offset + kv_length
        if _true(aligned) and (padding is None or _true(padding[:, kv_offset:].all())):
            return None
    found = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    if padding is not None and mask_function is causal_mask_function:
        own = torch.arange(q_length, device=padding.device) + q_offset
        found = found & padding[:, None, own, None]  # padding sees nothing
    found = found.contiguous()
    if not is_tracing(found):
        setattr(found, _SPANS, spans_of(found))  # computed once for all layers
    return found


def _check_model(config) -> None:
    """Raises InputError for a model that computes attention itself, such as BLOOM. It would add
    this bool mask to its scores as if it were a float mask."""
    if config is None or torch.compiler.is_compiling():  # the tracer cannot look up the model
        return
    model = MODEL_MAPPING.get(type(config), None)
    for each in model if isinstance(model, tuple) else (model,):
        if each is not None and not each._supports_sdpa:
            raise InputError(
                f"attn_implementation={NAME!r} needs a model that transformers can run with SDPA, "
                f"got {each.__name__}"
            )


def _true(x: bool | Tensor) -> bool:
    """x as a bool; False while tracing, because the graph must also hold for other values of x."""
    return not (isinstance(x, Tensor) and is_tracing(x)) and bool(x)


class Spans(NamedTuple):
    """Sequence b has the keys starts[b] <= j < ends[b]. Query i is at the position of key
    offset + i."""

    offset: int
    starts: list[int]
    ends: list[int]

    def runs(self) -> Iterator[tuple[slice, int]]:
        """Yields slices of adjacent sequences with the same start, and that start."""
        first = 0
        for start, group in itertools.groupby(self.starts):
            last = first + len(list(group))
            yield slice(first, last), start
            first = last


def spans_of(seen: Tensor) -> Spans | None:
    """The spans of a mask (B, 1, Tq, Tk); None if it is not a span mask."""
    if seen.dtype != torch.bool or seen.dim() != 4 or seen.shape[1] != 1:
        return None
    seen = seen[:, 0]  # (B, Tq, Tk)
    Tq, Tk = seen.shape[1:]
    if not 0 < Tq <= Tk:
        return None
    used, counts = seen.any(1), seen.sum(-1)  # (B, Tk), (B, Tq)
    starts = used.int().argmax(-1, keepdim=True)  # (B, 1)
    ends = starts + used.sum(-1, keepdim=True)
    i, j = torch.arange(Tq, device=seen.device), torch.arange(Tk, device=seen.device)
    own = starts + counts - 1  # the last key that a query sees is its own, offset + i
    offset = (own - i).masked_fill(counts == 0, 0).max().clamp(0, Tk - Tq)
    own = (offset + i).expand_as(own)
    inside = (starts <= own) & (own < ends)  # (B, Tq)
    expected = (starts[..., None] <= j) & (j <= own[..., None]) & inside[..., None]
    if not torch.equal(seen, expected):
        return None
    return Spans(offset.item(), starts[:, 0].tolist(), ends[:, 0].tolist())


# ---- attention


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, Tq, D), and so are the keys and values, of length Tk
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention, (B, Tq, H, D), and None in place of the probabilities, which the kernels never
    materialize.

    Raises InputError if the probabilities are requested or a head_mask is given. Anything except
    causal attention over spans of keys is passed to transformers' SDPA function.
    """
    _refuse(kwargs, attention_mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    spans, reason = None, _why_not(query, key, value, causal, kwargs)
    if reason is None and attention_mask is not None:
        spans, reason = _read(attention_mask, query, key)
    if reason is not None:
        _say_once(reason)
        if attention_mask is None and causal:
            attention_mask = _aligned(query, key)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=causal, **kwargs,
        )  # fmt: skip
    attend = functools.partial(_attend, scale=scaling, dropout=dropout)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, D) each
    return (attend(q, k, v) if spans is None else over_spans(attend, q, k, v, spans)), None


def over_spans(attend, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """The output of attend(q, k, v) for each run of sequences; zeros at padding. attend is causal,
    with the last query at the last key."""
    Tq, last = q.shape[1], spans.offset + q.shape[1]
    outputs = []
    for run, start in spans.runs():
        padding = max(start - spans.offset, 0)  # queries before the first key
        o = attend(q[run, padding:], k[run, start:last], v[run, start:last])
        outputs.append(F.pad(o, (0, 0, 0, 0, padding, 0)) if padding else o)
    o = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if min(spans.ends) == last:
        return o
    ends = torch.tensor(spans.ends, device=q.device)[:, None]
    beyond = torch.arange(last - Tq, last, device=q.device) >= ends  # (B, Tq)
    return o.masked_fill(beyond[..., None, None], 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[1] == 1 and dropout == 0.0 and not needs_gradient:
        lengths = torch.full((len(q),), k.shape[1], device=q.device)
        return kernels.decode_attention(q, k, v, lengths, softmax_scale=scale)
    return kernels.causal_attention(q, k, v, softmax_scale=scale, dropout_p=dropout)


def _refuse(kwargs: dict, attention_mask: Tensor | None) -> None:
    """Raises InputError for an argument that the kernels and SDPA both cannot honour; SDPA would
    ignore it."""
    if kwargs.get("head_mask") is not None:
        raise InputError(f"head_mask must be None with attn_implementation={NAME!r}")
    packed = kwargs.get("cu_seq_lens_q")
    if attention_mask is None and packed is not None and len(packed) > 2:
        raise InputError(
            f"with attn_implementation={NAME!r} packed sequences must be given by their "
            "position_ids, got cu_seq_lens_q alone"
        )
    if is_tracing():
        return
    if "attentions" in (output_capturing._active_collector.get() or ()):
        raise InputError("output_attentions=True needs attn_implementation='eager'")


def _why_not(query: Tensor, key: Tensor, value: Tensor, causal: bool, kwargs: dict) -> str | None:
    """The reason why the kernels cannot compute this attention; None if only the mask is left to
    check."""
    if not causal:
        return "not causal"
    if key.shape[1] != query.shape[1] or value.shape != key.shape:
        return "fewer heads of keys, or values of another size"
    if query.shape[2] > key.shape[2]:
        return "more queries than keys"
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    return f"{', '.join(unknown)} given" if unknown else None


def _read(mask: Tensor, query: Tensor, key: Tensor) -> tuple[Spans | None, str | None]:
    """The spans of a mask, and the reason if it has none."""
    if is_tracing(mask):
        return None, "a mask whose values torch.compile cannot read"
    shape = (query.shape[0], mask.shape[1], query.shape[2], key.shape[2])
    if mask.shape != shape and mask.dim() == 4:
        mask = mask.expand(shape)
    spans = getattr(mask, _SPANS) if hasattr(mask, _SPANS) else spans_of(mask)
    return spans, "a mask that is more than padding" if spans is None else None


def _aligned(query: Tensor, key: Tensor) -> Tensor | None:
    """The mask that None stands for, if SDPA would read None differently: the kernels align the
    last query with the last key, SDPA the first with the first."""
    Tq, Tk = query.shape[2], key.shape[2]
    if Tq == 1 or Tq >= Tk:
        return None
    return torch.ones(Tq, Tk, dtype=torch.bool, device=query.device).tril(Tk - Tq)[None, None]


@untraced
def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"{NAME}: this attention is left to PyTorch's SDPA ({reason})", stacklevel=3)
