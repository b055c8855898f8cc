"""transformers' GPT-2 on our kernels equals their own: logits, loss, gradients, what it generates.

Nothing but the computation changes, and what the kernels cannot compute is not computed wrongly.
"""

import copy
import functools
import itertools
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from util import DEVICE, assert_close_to, bits_equal, launches

import gpt2
from gpt2 import interop, kernels
from gpt2.errors import InputError

transformers = pytest.importorskip("transformers", minversion="5.4")

from gpt2 import transformers_attention, transformers_model  # noqa: E402
from gpt2.transformers_attention import NAME, Spans, spans_of  # noqa: E402

BACKEND = "triton" if DEVICE == "cuda" else "cpu"
pytestmark = () if DEVICE == "cuda" else pytest.mark.cpu_kernels
OURS = ("gpt2_kernels", "accelerated")
SMALL = {"vocab_size": 65, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.fixture(autouse=True)
def served_by_one_backend():
    with kernels.use(BACKEND):
        yield


@pytest.fixture
def no_sdpa(monkeypatch):
    """PyTorch's attention computes nothing in its place."""
    monkeypatch.setattr(
        transformers_attention, "sdpa_attention_forward", lambda *a, **k: pytest.fail("SDPA serves")
    )


def config_of(dropout=0.0, **sizes):
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return transformers.GPT2Config(**ends, **{**dict.fromkeys(names, dropout), **sizes})


def their_model(sizes=SMALL, how="eager", noise=0.05, **options):
    """Random weights, biases and norms too: all of them matter."""
    model = transformers.GPT2LMHeadModel(config_of(**sizes, **options)).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return served(model.eval(), how)


def served(model, how):
    """model itself, its attention or all of it computed in this way."""
    if how == "accelerated":
        return interop.accelerate_transformers(model)
    interop.register_attention()
    model.set_attn_implementation(how)
    return model


def as_served(model, how):
    return served(copy.deepcopy(model), how)


def batch(B=3, T=13, V=65, padding="none", count=(4, 0, 7)):
    """Ids, mask and positions with count[b] tokens of padding, and labels without it."""
    ids = torch.randint(1, V, (B, T), device=DEVICE)
    missing = torch.tensor(count, device=DEVICE)[:B, None] * (padding != "none")
    position = torch.arange(T, device=DEVICE)
    mask = position < T - missing if padding == "right" else position >= missing
    before = torch.cat([mask[:, :1], mask[:, :-1]], 1)  # the first token is predicted from padding
    return {
        "input_ids": ids.where(mask, 0),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": ids.where(mask & before, -100),
    }


def results(model, inputs, seed=0):
    """Logits but for padding's, loss, and every gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**inputs)
    output.loss.backward()
    logits = output.logits.detach()
    if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 2:
        logits = logits[mask.bool()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits, output.loss.detach(), gradients


def assert_as_good(exact, ours, plain, factor=2):
    """ours and plain as results gives them: the errors of a kernel against those of PyTorch."""
    logits, loss, gradients = exact
    assert_close_to(
        logits, ours[0], plain[0], "logits", factor=factor, terms=logits.abs().max().item()
    )
    # A single number: it may move by as much as a logit does, and by its own last bits.
    noise = factor * (plain[0] - logits).abs().max()
    assert (ours[1] - loss).abs() <= noise + 4 * torch.finfo(ours[1].dtype).eps * loss
    assert gradients.keys() == ours[2].keys()
    scale = max(g.square().mean().sqrt().item() for g in gradients.values())
    for name, g in gradients.items():
        assert g.abs().max() > 0, name
        what = (g, ours[2][name], plain[2][name], name)
        assert_close_to(*what, factor=factor + 1, terms=scale / 8)


# ---- logits, loss, gradients


def equals_theirs(sizes, how, padding):
    model = their_model(sizes)
    inputs = batch(V=model.config.vocab_size, padding=padding)
    plain = results(model, inputs)
    with launches() as launched:
        ours = results(as_served(model, how), inputs)
    assert set(launched) == {BACKEND}
    assert_as_good(results(model.double(), inputs), ours, plain)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("how", OURS)
def test_equals_theirs(how, padding, no_sdpa, ran):
    equals_theirs(SMALL, how, padding)
    ran(BACKEND)


@pytest.mark.full
@pytest.mark.parametrize(("how", "padding"), [(OURS[0], "right"), (OURS[1], "left")])
def test_equals_theirs_at_124M(how, padding, no_sdpa, ran):
    equals_theirs({}, how, padding)
    ran(BACKEND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_equals_theirs_in_16_bits(padding, dtype, no_sdpa):
    model = their_model().to(dtype)
    inputs = batch(padding=padding)
    plain, ours = (results(as_served(model, how), inputs) for how in ("eager", "accelerated"))
    assert_as_good(results(model.double(), inputs), ours, plain)


@pytest.mark.parametrize("scaled", [{"scale_attn_by_inverse_layer_idx": True}, {
    "scale_attn_weights": False}, {"layer_norm_epsilon": 0.1}, {
    "activation_function": "gelu_pytorch_tanh"}], ids=lambda x: next(iter(x)))  # fmt: skip
def test_its_configuration_is_the_one_computed(scaled, no_sdpa):
    model, inputs = their_model(**scaled), batch()
    plain, ours = (results(as_served(model, how), inputs) for how in ("eager", "accelerated"))
    assert_as_good(results(model.double(), inputs), ours, plain)


def test_all_of_it_is_computed_by_kernels():
    model = their_model(how="accelerated")
    with launches() as launched:
        results(model, batch())
    # forward and backward of 2 x (attention, gelu) and 5 norms, and the loss
    assert launched == [BACKEND] * 2 * (2 * 2 + 5 + 1)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_dropout_is_attention_s_own(padding, no_sdpa):
    """The masks are those of the reference for the same seeds, kept for the backward."""
    model = their_model(attn_pdrop=0.5, how=NAME)
    inputs = batch(padding=padding)
    still = results(model, inputs)
    ours, again = (results(model.train(), inputs) for _ in range(2))
    assert not torch.allclose(still[0], ours[0]) and bits_equal(ours[0], again[0])
    with kernels.use("reference"):
        plain, exact = results(model, inputs), results(model.double(), inputs)
    assert_as_good(exact, ours, plain)
    model.float()
    assert not bits_equal(results(model, inputs, seed=1)[0], ours[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", OURS)
def test_gradient_checkpointing_recomputes_the_same_bits(how, reentrant):
    model = their_model(dropout=0.3, how=how).train()
    inputs = batch(padding="left")
    with launches() as once:
        plain = results(model, inputs)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with launches() as twice:
        ours = results(model, inputs)
    assert len(twice) >= len(once) + 6, "nothing was computed again"
    for name, gradient in plain[2].items():
        assert bits_equal(gradient, ours[2][name]), name


# ---- the loss

ITEMS = {"mean": None, "int": 7, "tensor": torch.tensor(7)}


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_loss(ignored, shifted, items):
    logits = 3 * torch.randn(2, 9, 65, device=DEVICE)
    labels = torch.randint(65, (2, 9), device=DEVICE)
    labels[0, :4] = -100
    if ignored == "all":
        labels[:] = -100
    options = {"shift_labels": labels} if shifted else {}
    found = []
    for loss in (transformers.loss.loss_utils.ForCausalLMLoss, transformers_model.causal_lm_loss):
        x = logits.clone().requires_grad_()
        value = loss(x, labels, 65, num_items_in_batch=items, **options)
        value.backward()
        found.append((value, x.grad))
    assert found[1][0].isnan() == (ignored == "all" and items is None)
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-6, atol=1e-7)


def test_the_number_of_items_reaches_the_loss():
    model, inputs = their_model(how="accelerated"), batch()
    counted = (inputs["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        mean = model(**inputs).loss
        torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * counted).loss, mean / 2)


# ---- generation

LEFT = {"padding": "left"}
GREEDY = {"do_sample": False, "max_new_tokens": 12}
CASES = {
    "200-tokens": ({"B": 1}, {"max_new_tokens": 200}),
    "batch": ({}, {}),
    "left": (LEFT, {"max_new_tokens": 40}),
    "one-length": ({"padding": "left", "count": (3, 3, 3)}, {}),
    "no-cache": (LEFT, {"use_cache": False}),
    "static": ({}, {"cache_implementation": "static"}),
    "static-left": (LEFT, {"cache_implementation": "static"}),
    "beams": (LEFT, {"num_beams": 3, "num_return_sequences": 2}),
    "sampled": (LEFT, {"do_sample": True, "top_k": 20, "temperature": 0.8}),
    "prefill-in-chunks": ({}, {"prefill_chunk_size": 5}),
    "lookup": ({"B": 1}, {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30}),
    "stops": (LEFT, {"eos_token_id": list(range(1, 9)), "max_new_tokens": 30}),
}
IMPLEMENTATIONS = ("sdpa", *OURS)


def generate(model, how, prompts, options):
    """The tokens, and every forward's logits where the mask has not changed what they are of."""
    inputs = batch(V=model.config.vocab_size, **prompts)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[cC]alling .* directly.*")
        return as_served(model, how).generate(**inputs, **{**GREEDY, **options})


@functools.cache
def expected(case):
    """A model, and what it generates as transformers compute it."""
    torch.manual_seed(1)
    model = their_model(noise=0.3)  # what a token sees before it decides on the next
    return model, torch.get_rng_state(), generate(model, "eager", *CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_generates_what_they_do(how, case, request):
    model, state, want = expected(case)
    if how in OURS:
        request.getfixturevalue("no_sdpa")
    torch.set_rng_state(state)
    with launches() as launched:
        tokens = generate(model, how, *CASES[case])
    assert torch.equal(tokens, want)
    assert set(launched) == ({BACKEND} if how in OURS else set())
    assert len(set(want[0].tolist())) > 5, "too dull to tell anything"


@pytest.mark.full
@pytest.mark.parametrize(("how", "case"), [(OURS[0], "left"), (OURS[1], "200-tokens")])
def test_generates_what_they_do_at_124M(how, case, no_sdpa):
    prompts, options = CASES[case]
    model = their_model({})
    state = torch.get_rng_state()
    want = generate(model, "eager", prompts, options)
    torch.set_rng_state(state)
    assert torch.equal(generate(model, how, prompts, options), want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("how", OURS)
def test_more_tokens_after_a_cache(how, padding, cache, no_sdpa):
    """A second text of several tokens, padded as a batch or without a mask: Tq < Tk."""
    model, inputs = their_model(), batch(T=20, padding=padding, count=(4, 0, 9))
    del inputs["labels"]
    with torch.no_grad():
        want, exact = model(**inputs).logits, copy.deepcopy(model).double()(**inputs).logits
        past = {
            "dynamic": lambda: transformers.DynamicCache(config=model.config),
            "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=30),
        }[cache]()
        model, parts = served(model, how), []
        for first, last in ((0, 6), (6, 14), (14, 15), (15, 20)):
            now = {name: x[:, first:last] for name, x in inputs.items()}
            now["attention_mask"] = (
                inputs["attention_mask"][:, :last] if padding == "left" else None
            )
            parts.append(model(**now, past_key_values=past, use_cache=True).logits)
    seen = inputs["attention_mask"].bool()
    parts = torch.cat(parts, 1)[seen]
    largest = exact.abs().max().item()
    assert_close_to(exact[seen], parts, want[seen], "logits", factor=2, terms=largest)


# ---- masks


def mask_of(spans, Tq, Tk):
    """What Spans say, query by query."""
    seen = torch.zeros(len(spans.starts), 1, Tq, Tk, dtype=torch.bool)
    for b, (start, end) in enumerate(zip(spans.starts, spans.ends, strict=True)):
        for i in range(Tq):
            if start <= spans.offset + i < end:
                seen[b, 0, i, start : spans.offset + i + 1] = True
    return seen


@pytest.mark.parametrize("Tq, Tk", [(1, 1), (1, 4), (2, 2), (2, 4), (3, 3), (3, 4)])
def test_a_mask_is_one_of_spans_or_is_not(Tq, Tk):
    """Every mask there is: 4096 of 3 x 4."""
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
    """Views as transformers hand them, and NaN where no query may look."""
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
        """Of each query alone, over the keys that it sees."""
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
    """The batch with a mask of our own making."""
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
    """In a model whose configuration says so, and for whoever calls with no more than the mask."""
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
    text = {"prompts": {"B": 1}, "options": {"prompt_lookup_num_tokens": 3}}
    state, want = torch.get_rng_state(), generate(model, "eager", **text)
    torch.set_rng_state(state)
    assert torch.equal(generate(model, NAME, **text), want)


# ---- what is refused


def test_what_the_kernels_never_hold_is_refused():
    model, inputs = their_model(how=NAME), batch()
    with pytest.raises(InputError, match=r"output_attentions=True needs .*'eager'"):
        model(**inputs, output_attentions=True)
    model(**inputs, output_hidden_states=True)
    with pytest.raises(InputError, match="head_mask must be None"):
        model(**inputs, head_mask=torch.ones(2, 2))
    lengths = torch.tensor([0, 5, 13], dtype=torch.int32)
    with pytest.raises(InputError, match="packed sequences must be told by their position_ids"):
        model(inputs["input_ids"][:1], cu_seq_lens_q=lengths)
    model(inputs["input_ids"][:1], cu_seq_lens_q=lengths[::2])


class OtherAttention(transformers.models.gpt2.modeling_gpt2.GPT2Attention):
    pass


def set_at(path, value):
    def change(model):
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, model), name, value(model))

    return change


REFUSED = {
    "activation": (
        set_at("transformer.h.1.mlp.act", lambda m: nn.GELU()),
        r"transformer.h.1.mlp.act must be NewGELUActivation or GELUTanh, got GELU$",
    ),
    "norm": (
        set_at("transformer.ln_f", lambda m: nn.RMSNorm(32)),
        "transformer.ln_f must be LayerNorm, got RMSNorm",
    ),
    "bias": (
        set_at("transformer.h.0.ln_2", lambda m: nn.LayerNorm(32, bias=False)),
        "transformer.h.0.ln_2 must have a weight and a bias",
    ),
    "attention": (
        set_at("transformer.h.1.attn", lambda m: OtherAttention(m.config, layer_idx=1)),
        "transformer.h.1.attn must be GPT2Attention, got OtherAttention",
    ),
    "loss": (set_at("loss_function", lambda m: F.cross_entropy), "loss_function must be ForCaus"),
    "loss-type": (set_at("loss_type", lambda m: "ForMaskedLM"), "loss_function must be ForCaus"),
    "not-causal": (set_at("config.is_causal", lambda m: False), "model must be causal"),
    "crossed": (set_at("config.add_cross_attention", lambda m: True), "without cross-attention"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_not_gpt_2_is_refused_as_it_is(change, message):
    model = their_model()
    change(model)
    before = shape_of(model)
    with pytest.raises(InputError, match=message):
        interop.accelerate_transformers(model)
    assert shape_of(model) == before


def shape_of(model):
    """Its modules and their classes, its attributes, its attention."""
    classes = [(name, id(m), type(m)) for name, m in model.named_modules()]
    return classes, sorted(vars(model)), model.config.to_dict(), model.config._attn_implementation


def test_another_class_is_refused_by_name():
    heads = transformers.GPT2DoubleHeadsModel(config_of(**SMALL))
    for model, name in ((heads, "GPT2DoubleHeadsModel"), (nn.Linear(1, 1), "Linear")):
        with pytest.raises(InputError, match=f"must be a GPT2LMHeadModel, got {name}"):
            interop.accelerate_transformers(model)


FUNCTIONS = {
    "register": interop.register_attention,
    "accelerate": lambda: interop.accelerate_transformers(None),
    "restore": lambda: interop.restore_transformers(None),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_without_transformers_one_line_says_how_to_get_it(function, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda cache_position: None)
    with pytest.raises(InputError, match=r"must be 5.4 or newer, got \d.*pip install -U transf"):
        function()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers 5.4 or newer: pip install -U") as e:
        function()
    assert "\n" not in str(e.value)


# ---- nothing else changes


def test_there_and_back():
    """Every object, name and number is the old one."""
    model, inputs = their_model(how="sdpa"), batch(padding="left")
    before, parameters = shape_of(model), dict(model.named_parameters())
    state, plain = list(model.state_dict()), results(model, inputs)
    assert interop.accelerate_transformers(model) is model
    ours = results(model, inputs)
    assert interop.accelerate_transformers(model) is model
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == state
    assert [(n, i) for n, i, _ in shape_of(model)[0]] == [(n, i) for n, i, _ in before[0]]
    assert all(
        isinstance(m, kind) for m, (*_, kind) in zip(model.modules(), before[0], strict=True)
    )
    assert shape_of(model) != before and bits_equal(results(model, inputs)[0], ours[0])
    assert interop.restore_transformers(model) is model
    assert shape_of(model) == before
    with launches() as launched:
        assert bits_equal(results(model, inputs)[0], plain[0])
    assert not launched
    assert interop.restore_transformers(model) is model and shape_of(model) == before


def test_what_was_chosen_before_comes_back():
    loss = transformers.loss.loss_utils.ForCausalLMLoss
    model = their_model(how=NAME)
    model.loss_function = loss
    interop.restore_transformers(interop.accelerate_transformers(model))
    assert model.config._attn_implementation == NAME and model._loss_function is loss
    interop.accelerate_transformers(model).set_attn_implementation("eager")
    model.loss_function = F.cross_entropy
    interop.restore_transformers(model)
    assert model.config._attn_implementation == "eager"
    assert model.loss_function is F.cross_entropy, "chosen since"


def test_what_is_saved_is_theirs(tmp_path):
    model = their_model()
    model.save_pretrained(tmp_path / "theirs")
    interop.accelerate_transformers(model).save_pretrained(tmp_path / "ours")
    files = [sorted(path.iterdir()) for path in (tmp_path / "theirs", tmp_path / "ours")]
    for a, b in zip(*files, strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes(), a.name
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert type(loaded.transformer.ln_f) is nn.LayerNorm
    loaded = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", attn_implementation=NAME
    )
    assert loaded.config._attn_implementation == NAME


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_accelerated_and_of_its_own(again):
    model, inputs = their_model(how="accelerated"), batch(padding="left")
    other, counts = again(model), []
    for each in (model, other):
        with launches() as launched:
            logits = results(each, inputs)[0]
        counts.append(len(launched))
    assert counts[0] == counts[1] and bits_equal(logits, results(model, inputs)[0])
    interop.restore_transformers(other)
    assert type(other.transformer.ln_f) is nn.LayerNorm
    assert other.config._attn_implementation == "sdpa"
    assert type(model.transformer.ln_f) is transformers_model.LayerNorm
    assert model.config._attn_implementation == NAME


LOADS = """
import sys, torch, gpt2.interop
assert "transformers" not in sys.modules
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.full
def test_a_pickle_is_read_where_nothing_was_registered(tmp_path):
    """And importing interop does not import transformers."""
    model, inputs = their_model(how="accelerated").cpu(), batch(padding="left")
    names = [str(tmp_path / name) for name in ("model", "inputs", "logits")]
    torch.save(model, names[0]), torch.save(inputs, names[1])
    with kernels.use("cpu"):
        want = model(**inputs).logits
    root = Path(gpt2.__file__).parents[1]
    command = [sys.executable, "-c", LOADS, *names]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    torch.testing.assert_close(torch.load(names[2]), want)


# ---- training with others


def trained(how, folder, **options):
    """The losses and weights of a few steps of Trainer, over texts of several lengths."""
    torch.manual_seed(0)
    model = their_model(how=how)
    inputs = batch(B=8, T=20, padding="left", count=(0, 3, 9, 1, 0, 0, 5, 12))
    data = [{name: x[b].cpu() for name, x in inputs.items()} for b in range(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.1, optim="sgd", logging_steps=1, report_to=[], save_strategy="no", seed=0,
        use_cpu=DEVICE == "cpu", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, dict(model.named_parameters())


def test_trainer(tmp_path, no_sdpa):
    pytest.importorskip("accelerate")
    losses, parameters = trained("eager", tmp_path)
    with launches() as launched:
        ours, ours_parameters = trained("accelerated", tmp_path)
    assert len(launched) >= 3 * 2 * 20
    assert len(losses) == 3 and losses[0] != losses[2]
    assert ours == pytest.approx(losses, rel=1e-4)
    for name, p in parameters.items():
        torch.testing.assert_close(ours_parameters[name], p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", ["accelerated-first", "lora-first"])
def test_lora(order, no_sdpa):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model, inputs = their_model(), batch(padding="left")
    seed = torch.get_rng_state()
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    torch.set_rng_state(seed)
    if order == "accelerated-first":
        ours = peft.get_peft_model(interop.accelerate_transformers(model), config)
    else:
        ours = peft.get_peft_model(model, config)
        with pytest.raises(InputError, match="got PeftModelForCausalLM"):
            interop.accelerate_transformers(ours)
        interop.accelerate_transformers(ours.get_base_model())
    with launches() as launched:
        found = results(ours.eval(), inputs)
    assert launched.count(BACKEND) > 2 * 4 + 4
    plain = results(theirs.eval(), inputs)
    assert found[2] and all("lora" in name for name in found[2])
    merged = ours.merge_and_unload()
    with torch.no_grad():
        logits = merged(**inputs).logits[inputs["attention_mask"].bool()]
    exact = results(theirs.double(), inputs)
    assert_as_good(exact, found, plain)
    torch.testing.assert_close(logits.double(), exact[0], rtol=0, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiled(padding):
    """Without a mask all by kernels; a mask cannot be looked at, and is SDPA's."""
    model, inputs = their_model(), batch(padding=padding)
    if padding == "none":
        inputs["attention_mask"] = inputs["position_ids"] = None
    plain = results(model, inputs)
    ours = interop.accelerate_transformers(copy.deepcopy(model))
    transformers_attention._said.clear()
    with launches() as launched, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = results(torch.compile(ours, backend="aot_eager", fullgraph=True), inputs)
    assert launched.count(BACKEND) >= 2 * (5 + 1 + 2 * (padding == "none"))
    assert any("cannot look at" in str(w.message) for w in said) == (padding == "left")
    names = {name.removeprefix("_orig_mod."): g for name, g in found[2].items()}
    assert_as_good(results(model.double(), inputs), (*found[:2], names), plain)
