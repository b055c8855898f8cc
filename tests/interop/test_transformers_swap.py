"""Switching transformers' GPT-2 to our kernels and back changes only the computation. What the
kernels cannot compute is refused by name."""

import copy
import functools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from their_gpt2 import (
    BACKEND,
    MARKS,
    SMALL,
    assert_as_good,
    batch,
    config_of,
    results,
    their_model,
    transformers,
)
from torch import nn
from util import DEVICE, bits_equal, launches

import gpt2
from gpt2 import interop, kernels
from gpt2.errors import InputError
from gpt2.interop import transformers_attention, transformers_model
from gpt2.interop.transformers_attention import NAME

pytestmark = [MARKS, pytest.mark.usefixtures("served_by_one_backend")]


def test_what_the_kernels_never_hold_is_refused():
    model, inputs = their_model(how=NAME), batch()
    with pytest.raises(InputError, match=r"output_attentions=True needs .*'eager'"):
        model(**inputs, output_attentions=True)
    model(**inputs, output_hidden_states=True)
    with pytest.raises(InputError, match="head_mask must be None"):
        model(**inputs, head_mask=torch.ones(2, 2))
    lengths = torch.tensor([0, 5, 13], dtype=torch.int32)
    with pytest.raises(InputError, match="packed sequences must be given by their position_ids"):
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
    """The model's modules and their classes, its attributes, and its attention."""
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
    """All objects, names and numbers are the old ones."""
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
    """Importing interop does not import transformers either."""
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
    """The losses and weights of a few steps of Trainer, for texts of several lengths."""
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
    """Without a mask the kernels compute everything; a mask cannot be inspected, so SDPA is
    used."""
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
    assert any("cannot read" in str(w.message) for w in said) == (padding == "left")
    names = {name.removeprefix("_orig_mod."): g for name, g in found[2].items()}
    assert_as_good(results(model.double(), inputs), (*found[:2], names), plain)
