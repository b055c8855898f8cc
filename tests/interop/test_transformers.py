"""transformers' GPT-2 on our kernels equals the original: logits, loss, gradients, generated
tokens."""

import copy
import functools

import pytest
import torch
from their_gpt2 import (
    BACKEND,
    MARKS,
    OURS,
    SMALL,
    as_served,
    assert_as_good,
    batch,
    generates_what_they_do,
    results,
    served,
    their_model,
    transformers,
)
from util import DEVICE, assert_close_to, bits_equal, launches

from gpt2 import kernels
from gpt2.interop import transformers_model
from gpt2.interop.transformers_attention import NAME

pytestmark = [MARKS, pytest.mark.usefixtures("served_by_one_backend")]


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
    """The masks equal those of the reference for the same seeds, and the backward uses them."""
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
IMPLEMENTATIONS = ("eager", *OURS)


@functools.cache
def random_model(case):
    """A model, and the random state that gives it the same prompts every time."""
    torch.manual_seed(1)
    return their_model(noise=0.3), torch.get_rng_state()  # the context must affect the next token


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_generates_what_they_do(how, case, request):
    model, state = random_model(case)
    if how in OURS:
        request.getfixturevalue("no_sdpa")
    torch.set_rng_state(state)
    with launches() as launched:
        tokens = generates_what_they_do(model, how, *CASES[case])
    assert set(launched) == ({BACKEND} if how in OURS else set())
    assert len(set(tokens[0].tolist())) > 5, "too dull to tell anything"


@pytest.mark.full
@pytest.mark.parametrize(("how", "case"), [(OURS[0], "left"), (OURS[1], "200-tokens")])
def test_generates_what_they_do_at_124M(how, case, no_sdpa):
    generates_what_they_do(their_model({}), how, *CASES[case])


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
