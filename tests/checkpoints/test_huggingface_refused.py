"""Hugging Face's files that are refused, before memory is allocated for weights."""

import json
import re

import pytest
import torch
from huggingface_models import reconfigure, rewrite, same
from safetensors.torch import load_file, save_file

from gpt2 import Model
from gpt2.checkpoints import huggingface
from gpt2.errors import InputError

CONFIGS = {
    "model_type": "gptj",
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "quantization_config": {"bits": 4},
    "n_inner": 24,
    "n_embd": "8",
    "n_head": 3,
    "n_layer": 0,
    "vocab_size": 2.0,
    "hidden_size": 16,
    "n_positions": True,
}


@pytest.mark.parametrize(("key", "value"), CONFIGS.items(), ids=CONFIGS)
def test_a_configuration_it_does_not_compute_is_refused_by_name_and_value(key, value, saved):
    _, folder = saved
    reconfigure(folder, **{key: value})
    name = {"n_positions": "block_size", "n_head": "n_embd"}.get(key, key)
    got = "n_head=3" if key == "n_head" else re.escape(repr(value))
    with pytest.raises(InputError, match=f"config.json': .*{name}.*must be.*got .*{got}"):
        Model.from_pretrained(folder)


def test_what_changes_numerics_alone_is_accepted(saved):
    _, folder = saved
    reconfigure(folder, reorder_and_upcast_attn=True, n_inner=32, summary_type="mean", n_ctx=16)
    reconfigure(folder, activation_function="gelu_pytorch_tanh", unknown=[1])
    Model.from_pretrained(folder)


WTE, LN, FC = "transformer.wte.weight", "transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.weight"
BROKEN = {
    "missing": (lambda t: {k: t[k] for k in t if k != LN}, f"missing: {LN}; unexpected: none"),
    "unexpected": (lambda t: {**t, "x": torch.zeros(1)}, "unexpected: transformer.x"),
    "layer": (lambda t: {k: t[k] for k in t if ".1." not in k}, r"missing: .* and 9 more"),
    "shape": (lambda t: {**t, LN: torch.zeros(9)}, rf"{LN} as .* of shape \(8,\), got F32 .*\(9,"),
    "not-transposed": (lambda t: {**t, FC: t[FC].T.contiguous()}, r"shape \(8, 32\), got F32.*32"),
    "dtype": (lambda t: {**t, LN: t[LN].long()}, f"{LN} as F64, F32, BF16, F16 .*got I64"),
    "twice": (lambda t: {**t, "ln_f.bias": t[LN].clone()}, f"must hold {LN} once"),
    "untied": (lambda t: {**t, "lm_head.weight": t[WTE] + 1}, "head that is tied"),
    "head-shape": (lambda t: {**t, "lm_head.weight": torch.zeros(9, 8)}, "lm_head.weight as"),
}


@pytest.mark.parametrize("files", ["one-file", "shards"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_weights_that_do_not_fit_are_refused_by_name(change, message, files, saved, monkeypatch):
    """Refused before a model is built or memory allocated."""
    _, folder = saved
    rewrite(folder, change)
    if files == "shards":
        split(folder)
    monkeypatch.setattr(
        "gpt2.model.Model.from_state", lambda *args, **kwargs: pytest.fail("too late")
    )
    with pytest.raises(InputError, match=f"{folder}' .*{message}") as error:
        Model.from_pretrained(folder)
    assert "\n" not in str(error.value)


def split(folder):
    """Splits the single file into two shards."""
    tensors = load_file(folder / huggingface.FILE)
    (folder / huggingface.FILE).unlink()
    where = {key: f"{'ab'[i % 2]}.safetensors" for i, key in enumerate(tensors)}
    for name in ("a.safetensors", "b.safetensors"):
        save_file({k: v for k, v in tensors.items() if where[k] == name}, folder / name)
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))


INDICES = {
    "no-map": (lambda m: {}, "must hold a weight_map"),
    "list": (lambda m: {"weight_map": [1]}, "must hold a weight_map"),
    "number": (lambda m: {"weight_map": {**m, WTE: 1}}, "must hold a weight_map"),
    "outside": (lambda m: {"weight_map": {**m, WTE: "../a.safetensors"}}, "files in its folder"),
    "pickle": (lambda m: {"weight_map": {**m, WTE: "a.bin"}}, "files in its folder, got 'a.bin'"),
    "gone": (
        lambda m: {"weight_map": {**m, WTE: "c.safetensors"}},
        "c.safetensors' must be a",
    ),
    "unlisted": (lambda m: {"weight_map": {k: m[k] for k in m if k != WTE}}, f"differs in: {WTE}"),
    "moved": (lambda m: {"weight_map": dict.fromkeys(m, "a.safetensors")}, "differs in: "),
}


@pytest.mark.parametrize(("change", "message"), INDICES.values(), ids=INDICES)
def test_an_index_that_does_not_fit_is_refused(change, message, saved):
    model, folder = saved
    split(folder)
    assert same(Model.from_pretrained(folder), model)
    where = json.loads((folder / huggingface.INDEX).read_text())["weight_map"]
    (folder / huggingface.INDEX).write_text(json.dumps(change(where)))
    with pytest.raises(InputError, match=message):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("size", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_absurd_sizes_allocate_nothing(size, saved):
    _, folder = saved
    reconfigure(folder, **{size: 2**40})
    with pytest.raises(InputError, match="must hold"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("name", [huggingface.CONFIG, huggingface.INDEX])
def test_json_of_any_size_is_not_read(name, saved):
    _, folder = saved
    if name == huggingface.INDEX:
        split(folder)
    (folder / name).write_text("[" * (2**20 + 1))
    with pytest.raises(InputError, match=f"{name}' must be JSON: at most 1048576 bytes are read"):
        Model.from_pretrained(folder)


def test_a_folder_without_weights_says_what_is_missing(saved):
    _, folder = saved
    (folder / huggingface.FILE).unlink()
    with pytest.raises(InputError, match=r"must hold model.safetensors or .*, got neither"):
        Model.from_pretrained(folder)
    with pytest.raises(InputError, match=r"model must be gpt2, .*, a folder .* got 'no/such'"):
        Model.from_pretrained("no/such")


def test_a_pickle_is_refused_with_the_command_that_converts_it(saved):
    """The command in the message does convert it."""
    pytest.importorskip("transformers")
    model, folder = saved
    torch.save(load_file(folder / huggingface.FILE), folder / "pytorch_model.bin")
    Model.from_pretrained(folder)  # a pickle beside safetensors is no reason to refuse
    (folder / huggingface.FILE).unlink()
    with pytest.raises(InputError, match=r"got a pickle.*convert it: python -c") as error:
        Model.from_pretrained(folder)
    import shlex

    *_, python, flag, code = shlex.split(str(error.value).partition("convert it: ")[2])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert same(Model.from_pretrained(folder), model)
