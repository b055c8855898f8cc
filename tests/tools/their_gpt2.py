"""transformers' GPT-2 for tests: random models, computed by transformers and by our kernels."""

import copy
import warnings

import pytest
import torch
from util import DEVICE, assert_close_to

from gpt2 import interop

transformers = pytest.importorskip("transformers", minversion="5.4")
BACKEND = "triton" if DEVICE == "cuda" else "cpu"
MARKS = pytest.mark.triton if DEVICE == "cuda" else pytest.mark.cpu_kernels
OURS = ("gpt2_kernels", "accelerated")
SMALL = {"vocab_size": 65, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}


def config_of(dropout=0.0, **sizes):
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return transformers.GPT2Config(**ends, **{**dict.fromkeys(names, dropout), **sizes})


def their_model(sizes=SMALL, how="eager", noise=0.05, **options):
    """A model with random parameters, biases and norms included: all affect the result."""
    model = transformers.GPT2LMHeadModel(config_of(**sizes, **options)).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return served(model.eval(), how)


def served(model, how):
    """The model itself, after `how` has replaced its attention or all of it."""
    if how == "accelerated":
        return interop.accelerate_transformers(model)
    interop.register_attention()
    model.set_attn_implementation(how)
    return model


def as_served(model, how):
    return served(copy.deepcopy(model), how)


def batch(B=3, T=13, V=65, padding="none", count=(4, 0, 7)):
    """Ids, mask and positions with count[b] tokens of padding, and labels that ignore them."""
    ids = torch.randint(1, V, (B, T), device=DEVICE)
    missing = torch.tensor(count, device=DEVICE)[:B, None] * (padding != "none")
    position = torch.arange(T, device=DEVICE)
    mask = position < T - missing if padding == "right" else position >= missing
    before = torch.cat([mask[:, :1], mask[:, :-1]], 1)  # a first token has only padding before it
    return {
        "input_ids": ids.where(mask, 0),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": ids.where(mask & before, -100),
    }


def results(model, inputs, seed=0):
    """Logits without padding, loss, and every gradient."""
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
    """Compares the errors of `ours` with those of `plain`, both as returned by results()."""
    logits, loss, gradients = exact
    assert_close_to(
        logits, ours[0], plain[0], "logits", factor=factor, terms=logits.abs().max().item()
    )
    # The loss is a single number: it may move by as much as a logit, and by its own last bits.
    noise = factor * (plain[0] - logits).abs().max()
    assert (ours[1] - loss).abs() <= noise + 4 * torch.finfo(ours[1].dtype).eps * loss
    assert gradients.keys() == ours[2].keys()
    scale = max(g.square().mean().sqrt().item() for g in gradients.values())
    for name, g in gradients.items():
        assert g.abs().max() > 0, name
        what = (g, ours[2][name], plain[2][name], name)
        assert_close_to(*what, factor=factor + 1, terms=scale / 8)


GREEDY = {"do_sample": False, "max_new_tokens": 12, "disable_compile": True}
SAID = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def generate(model, how, prompts, options):
    """transformers' output: the prompts with their continuations, and the logits of every step."""
    inputs = batch(V=model.config.vocab_size, **prompts)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[cC]alling .* directly.*")
        found = as_served(model, how).generate(**inputs, **{**GREEDY, **SAID, **options})
    return inputs, found


def logits_after(model, inputs, tokens):
    """Logits (B, n, V), computed without a cache, from which the last n of tokens were chosen."""
    B, T = inputs["attention_mask"].shape
    seen = inputs["attention_mask"].repeat_interleave(len(tokens) // B, 0)
    seen = torch.cat([seen, seen.new_ones(len(tokens), tokens.shape[1] - T)], 1)[:, :-1]
    position = (seen.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens[:, :-1], attention_mask=seen, position_ids=position).logits
    return logits[:, T - 1 :]


def generates_what_they_do(model, how, prompts, options):
    """The logits of every step, from a cache, equal those of transformers for the same tokens.

    Tokens are not compared: if the two best logits nearly tie, rounding decides, and all later
    tokens differ. The error is compared with the worse of transformers' own attentions, because on
    a GPU its SDPA is less exact than its eager attention.
    """
    inputs, found = generate(model, how, prompts, options)
    T, tokens = inputs["input_ids"].shape[1], found.sequences
    exact = logits_after(as_served(model, "eager").double(), inputs, tokens)
    plains = [logits_after(as_served(model, name), inputs, tokens) for name in ("eager", "sdpa")]
    plain = max(plains, key=lambda x: (x - exact).abs().max())
    largest = exact.abs().max().item()
    if "num_beams" in options:  # the logits are of beams, many of which were abandoned
        noise = 2 * (plain - exact).abs().max() + torch.finfo(plain.dtype).eps * largest
        scores = exact.log_softmax(-1).gather(-1, tokens[:, T:, None]).mean((1, 2))
        assert (found.sequences_scores - scores).abs().max() <= 2 * noise  # of a logit and the sum
        return tokens
    # After the end of a text, the last logits are those that chose the end.
    ends = torch.isin(tokens[:, T:], tokens.new_tensor(options.get("eos_token_id", [])))
    open_ = ends.cumsum(-1) - ends.long() == 0
    ours = torch.stack(found.logits, 1)
    assert_close_to(exact[open_], ours[open_], plain[open_], "logits", factor=2, terms=largest)
    if not options.get("do_sample"):
        assert torch.equal(tokens[:, T:][open_], ours.argmax(-1)[open_])
    assert (tokens[:, T:][~open_] == model.config.pad_token_id).all()
    return tokens
