"""transformers' masks: which ones the kernels support, and which are left to PyTorch."""

import itertools
import types

import pytest
import torch
from their_gpt2 import (
    MARKS,
    OURS,
    as_served,
    assert_as_good,
    batch,
    generates_what_they_do,
    results,
    their_model,
    transformers,
)
from util import DEVICE, assert_close_to

from gpt2.interop import transformers_attention
from gpt2.interop.transformers_attention import NAME, Spans, spans_of

pytestmark = [MARKS, pytest.mark.usefixtures("served_by_one_backend")]


def mask_of(spans, Tq, Tk):
    """The mask of Spans, query by query."""
    seen = torch.zeros(len(spans.starts), 1, Tq, Tk, dtype=torch.bool)
    for b, (start, end) in enumerate(zip(spans.starts, spans.ends, strict=True)):
        for i in range(Tq):
            if start <= spans.offset + i < end:
                seen[b, 0, i, start : spans.offset + i + 1] = True
    return seen


@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 4), (2, 2), (2, 4), (3, 3), (3, 4)])
def test_a_mask_is_one_of_spans_or_is_not(Tq, Tk):
    """Tests every mask: 4096 of 3 x 4."""
    masks = set()
    for offset, start, end in itertools.product(range(Tk - Tq + 1), range(Tk + 1), range(Tk + 1)):
        masks.add(tuple(mask_of(Spans(offset, [start], [end]), Tq, Tk).flatten().tolist()))
    for bits in itertools.product([False, True], repeat=Tq * Tk):
        mask = torch.tensor(bits).view(1, 1, Tq, Tk)
        found = spans_of(mask)
        assert (found is not None) == (bits in masks), mask
        assert found is None or torch.equal(mask_of(found, Tq, Tk), mask)


SHAPES = {  # spans of a batch, Tq, Tk
    "causal": (Spans(0, [0, 0], [5, 5]), 5, 5),
    "past": (Spans(4, [0, 0], [9, 9]), 5, 9),
    "left": (Spans(0, [3, 0, 0, 1], [6, 6, 6, 6]), 6, 6),
    "left-and-past": (Spans(3, [5, 1, 1], [8, 8, 8]), 5, 8),
    "right": (Spans(0, [0, 0, 0], [6, 2, 5]), 6, 6),
    "both": (Spans(0, [2, 1], [5, 6]), 6, 6),
    "static": (Spans(2, [0, 1], [7, 7]), 5, 12),
    "decode": (Spans(4, [0, 3, 3], [5, 5, 5]), 1, 9),
    "empty": (Spans(0, [0, 1, 0], [0, 4, 4]), 4, 4),
    "one-token": (Spans(3, [0, 0], [0, 4]), 1, 4),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("spans", "Tq", "Tk"), SHAPES.values(), ids=SHAPES)
def test_attention_over_spans(spans, Tq, Tk, gradient, no_sdpa):
    """Views in the layout of transformers, with NaN where no query may read."""
    B, mask = len(spans.starts), mask_of(spans, Tq, Tk)
    q, k, v = (torch.randn(B, T, 2, 16) for T in (Tq, Tk, Tk))
    for b, start in enumerate(spans.starts):
        k[b, :start], v[b, spans.offset + Tq :] = float("nan"), float("nan")
    do, module = torch.randn(B, Tq, 2, 16), types.SimpleNamespace(is_causal=True)

    def run(attend, dtype):
        xs = [x.to(DEVICE, dtype, copy=True).requires_grad_(gradient) for x in (q, k, v)]
        o = attend(*(x.transpose(1, 2) for x in xs))
        return o, torch.autograd.grad(o, xs, do.to(o)) if gradient else ()

    def ours(q, k, v):
        return transformers_attention.attention(module, q, k, v, mask.to(DEVICE), scaling=0.3)[0]

    def theirs(q, k, v):
        """The attention of each query alone, over the keys that it sees."""
        o = torch.zeros_like(q).unbind(2)
        rows = []
        for i in range(Tq):
            of = []
            for b in range(B):
                seen = mask[b, 0, i].to(DEVICE)
                s = 0.3 * (k[b][:, seen] @ q[b, :, i, :, None])  # (H, keys, 1)
                of.append((s.softmax(1) * v[b][:, seen]).sum(1) if seen.any() else o[i][b] * 0)
            rows.append(torch.stack(of))
        return torch.stack(rows, 1)  # (B, Tq, H, D)

    (o, grads), (plain, plain_grads) = run(ours, torch.float32), run(theirs, torch.float32)
    exact, exact_grads = run(theirs, torch.float64)
    assert_close_to(exact, o, plain, "output", factor=2, terms=1)
    assert not o[~mask.any(-1)[:, 0]].any(), "padding is zero"
    for name, *x in zip("qkv"[: len(grads)], exact_grads, grads, plain_grads, strict=True):
        assert_close_to(*x, name, factor=3, terms=8)  # delta and dp, sums of 16 products, cancel


def test_spans_are_read_once_per_forward(monkeypatch):
    calls = []
    real = spans_of
    monkeypatch.setattr(transformers_attention, "spans_of", lambda m: (calls.append(m), real(m))[1])
    model, inputs = their_model(how=NAME), batch(padding="left")
    model(**inputs)
    assert len(calls) == 1
    model(**batch())
    assert len(calls) == 1, "and where nothing is padding, not at all"


def four_d(inputs, change):
    """The batch with a custom mask."""
    T = inputs["input_ids"].shape[1]
    mask = change(torch.ones(len(inputs["input_ids"]), 1, T, T, dtype=torch.bool).tril())
    return {**inputs, "attention_mask": mask.to(DEVICE)}


def hole(mask):
    mask[:, :, 5:, 3] = False
    return mask


def prefix(mask):
    mask[:, :, 4:, 4:] = False
    return mask


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~hole(mask), torch.finfo(torch.float32).min)


def packed(inputs):
    position = torch.tensor([*range(5), *range(8)], device=DEVICE).expand(3, -1)
    return {**inputs, "attention_mask": None, "position_ids": position, "use_cache": False}


def padded_within(inputs):
    mask = inputs["attention_mask"].clone()
    mask[:, 4:6] = 0
    labels = inputs["labels"].clone()
    labels[:, 4:7] = -100
    return {**inputs, "attention_mask": mask, "labels": labels}


ODD = {
    "hole": lambda inputs: four_d(inputs, hole),
    "prefix": lambda inputs: four_d(inputs, prefix),
    "additive": lambda inputs: four_d(inputs, additive),
    "one-for-all": lambda inputs: four_d(inputs, lambda mask: hole(mask)[:1]),
    "not-causal": lambda inputs: four_d(inputs, lambda mask: torch.ones_like(mask)),
    "packed": packed,
    "padded-within": padded_within,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("how", OURS)
def test_other_masks_are_left_to_sdpa_and_it_is_said(how, odd):
    model = their_model(how="sdpa")
    inputs = odd(batch())
    plain = results(model, inputs)
    transformers_attention._said.clear()
    with pytest.warns(UserWarning, match="left to PyTorch's SDPA .a mask that is more than paddin"):
        ours = results(as_served(model, how), inputs)
    if inputs["attention_mask"] is not None and inputs["attention_mask"].dtype == torch.float32:
        inputs["attention_mask"] = inputs["attention_mask"].double()
    assert_as_good(results(model.double(), inputs), ours, plain)


@pytest.mark.parametrize("causal", ["causal", "one-for-all-causal"])
def test_a_causal_mask_of_four_dimensions_is_the_kernels_own(causal, no_sdpa):
    model, inputs = their_model(), batch()
    plain = results(model, inputs)
    mask = four_d(inputs, lambda mask: mask[:1] if "one" in causal else mask)
    ours = results(as_served(model, NAME), mask)
    shape = plain[0].shape
    ours = (ours[0].reshape(shape), *ours[1:])
    assert_as_good(results(model.double(), inputs), ours, plain)


def test_cross_attention_is_left_to_sdpa():
    transformers_attention._said.clear()
    model = their_model(add_cross_attention=True)
    inputs = batch()
    inputs["encoder_hidden_states"] = torch.randn(3, 5, 32, device=DEVICE)
    inputs["encoder_attention_mask"] = torch.tensor([[1] * 5, [1] * 4 + [0], [1] * 5]).to(DEVICE)
    plain = results(model, inputs)
    with pytest.warns(UserWarning, match="SDPA .not causal"):
        ours = results(as_served(model, NAME), inputs)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].double()
    assert_as_good(results(model.double(), inputs), ours, plain)


def test_a_mask_is_spelled_out_where_it_is_not_causal():
    """For a model whose configuration says so, and for callers that pass only the mask."""
    bidirectional = transformers.masking_utils.bidirectional_mask_function
    options = {"mask_function": bidirectional, "allow_is_bidirectional_skip": True}
    mask = transformers_attention.mask(batch_size=2, q_length=4, kv_length=4, **options)
    assert mask is not None and mask.shape == (2, 1, 4, 4) and mask.all()
    model, inputs = their_model(), batch()
    model.config.is_causal = False
    plain, ours = (results(as_served(model, how), inputs) for how in ("eager", NAME))
    assert_as_good(results(model.double(), inputs), ours, plain)


OTHERS = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "grouped": ("Llama", {"num_key_value_heads": 1}),
    "sliding": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
}


@pytest.mark.filterwarnings("ignore:gpt2_kernels. this attention is left")
@pytest.mark.parametrize(("name", "options"), OTHERS.values(), ids=OTHERS)
def test_other_models_are_right(name, options):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=65, num_attention_heads=2, pad_token_id=0, eos_token_id=None, **sizes, **options
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(DEVICE).eval()
    inputs = batch(padding="left")
    plain, ours = (results(as_served(model, how), inputs) for how in ("eager", NAME))
    assert_as_good(results(as_served(model, "sdpa").double(), inputs), ours, plain)
    generates_what_they_do(model, NAME, {"B": 1}, {"prompt_lookup_num_tokens": 3})
