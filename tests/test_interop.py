"""Hugging Face's GPT-2, in and out: equal to transformers, whole or refused, never a pickle."""

import itertools
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from util import bits_equal

from gpt2 import Config, Model, interop
from gpt2.errors import InputError

SMALL = Config(block_size=16, vocab_size=33, n_layer=2, n_head=2, n_embd=8)
SIZES = {"small": SMALL, "124M": Config.named("gpt2")}
SIZES = [
    pytest.param(config, id=name, marks=pytest.mark.full if name == "124M" else ())
    for name, config in SIZES.items()
]


def random_model(config=SMALL):
    """All parameters random, biases and norms too."""
    model = Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def their_model(config):
    """transformers' GPT-2 with random weights."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return theirs


def load_theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")


def assert_equal_models(ours, theirs):
    """Every weight to the bit; logits, loss and every gradient, in float64."""
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert bits_equal(p.detach(), as_ours(name, parameters[name].detach())), name
    ours, theirs = ours.double(), theirs.double().eval()
    V = ours.config.vocab_size
    idx, targets = torch.randint(V, (2, 2, 9)).unbind()
    logits, loss = ours(idx, targets)
    output = theirs(idx)
    their_loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    loss.backward(), their_loss.backward()
    assert_close("logits", logits, output.logits)
    assert_close("loss", loss, their_loss)
    for name, p in ours.named_parameters():
        assert p.grad.abs().max() > 0
        assert_close(name, p.grad, as_ours(name, parameters[name].grad))


def assert_close(name, ours, theirs):
    """Equal but for the rounding of sums in another order."""
    bound = 64 * torch.finfo(ours.dtype).eps * theirs.abs().max().clamp(min=1)
    assert (ours - theirs).abs().max() <= bound, name


def as_ours(name, weight):
    """transformers store the four projections as (in, out)."""
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return weight.T.contiguous() if name.endswith(projections) else weight


# ---- parity


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("files", ["one-file", "shards"])
def test_loads_what_transformers_save(files, config, tmp_path):
    theirs = their_model(config)
    size = sum(p.nbytes for p in theirs.parameters())
    theirs.save_pretrained(tmp_path, max_shard_size="50GB" if files == "one-file" else size // 2)
    assert (tmp_path / interop.INDEX).exists() == (files == "shards")
    assert_equal_models(Model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("files", ["one-file", "shards"])
def test_transformers_load_what_is_saved(files, config, tmp_path):
    ours = random_model(config)
    size = sum(p.nbytes for p in ours.parameters())
    ours.save_pretrained(tmp_path, max_shard_size="50GB" if files == "one-file" else size // 2)
    assert (tmp_path / interop.INDEX).exists() == (files == "shards")
    theirs = load_theirs(tmp_path)
    assert theirs.config.n_positions == config.block_size
    assert_equal_models(ours, theirs)


@pytest.fixture
def saved(tmp_path):
    """A small model, and its folder."""
    model = random_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / interop.FILE)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / interop.FILE, {"format": "pt"})


def reconfigure(folder, **changes):
    found = json.loads((folder / interop.CONFIG).read_text())
    (folder / interop.CONFIG).write_text(json.dumps({**found, **changes}))


def same(a, b):
    return all(bits_equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def short(tensors):
    """Keys and masks of the published gpt2."""
    masks = {
        **{f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)},
        **{f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)},
    }
    return {k.removeprefix("transformer."): v for k, v in tensors.items()} | masks


FORMS = {
    "published": short,
    "masks": lambda t: {**t, "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).bool()},
    "head": lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()},
    "head-alone": lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_other_forms_of_the_same_weights(form, saved):
    model, folder = saved
    rewrite(folder, form)
    assert same(Model.from_pretrained(folder), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype, saved):
    model, folder = saved
    rewrite(folder, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    loaded = Model.from_pretrained(folder)
    for p, q in zip(loaded.parameters(), model.parameters(), strict=True):
        assert bits_equal(p, q.to(dtype).float())


def test_saves_its_own_dtype(tmp_path):
    model = random_model().bfloat16()
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / interop.FILE).values()} == {torch.bfloat16}
    assert load_theirs(tmp_path).dtype == torch.bfloat16


def test_a_loaded_model_is_tied_in_eval_mode_and_owns_its_memory(saved):
    model, folder = saved
    loaded = Model.from_pretrained(folder, fast=True)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.fast and not loaded.training
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    with open(folder / interop.FILE, "r+b") as file:  # in place: what is mapped would change
        file.seek(-4000, 2)
        file.write(b"\0" * 4000)
    assert same(loaded, model)


def test_dropout_is_an_argument_and_the_configs_if_asked_for(saved):
    _, folder = saved
    assert Model.from_pretrained(folder).config.dropout == 0.0
    reconfigure(folder, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    assert Model.from_pretrained(folder).config.dropout == 0.0
    assert Model.from_pretrained(folder, dropout=0.2).config.dropout == 0.2
    assert Model.from_pretrained(folder, dropout=None).config.dropout == 0.1
    reconfigure(folder, attn_pdrop=0.0)
    with pytest.raises(InputError, match="must be one dropout"):
        Model.from_pretrained(folder, dropout=None)


def test_sizes_by_other_names_and_by_default(saved):
    model, folder = saved
    found = json.loads((folder / interop.CONFIG).read_text())
    for ours, theirs in (("n_embd", "hidden_size"), ("n_head", "num_attention_heads")):
        found[theirs] = found.pop(ours)
    (folder / interop.CONFIG).write_text(json.dumps(found))
    assert Model.from_pretrained(folder).config == model.config
    (folder / interop.CONFIG).write_text("{}")
    assert interop.read_config(folder) == Config(1024, 50257, 12, 12, 768, 0.1)


# ---- saving


def test_a_file_says_pt_and_nothing_else_is_left(saved):
    _, folder = saved
    assert {path.name for path in folder.iterdir()} == {interop.CONFIG, interop.FILE}
    with safe_open(folder / interop.FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (folder / "other").touch()
    assert (folder / interop.FILE).stat().st_mode == (folder / "other").stat().st_mode


def test_shards_hold_at_most_what_is_asked_for_and_the_index_says_where(saved):
    model, folder = saved
    model.save_pretrained(folder / "shards", max_shard_size="1KB")
    index = json.loads((folder / "shards" / interop.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    names = sorted(set(index["weight_map"].values()))
    assert names == [
        f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
    ]
    sizes = []
    for name in names:
        tensors = load_file(folder / "shards" / name)
        assert {k for k, v in index["weight_map"].items() if v == name} == tensors.keys()
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert sizes[-1] <= 1000 or len(tensors) == 1
    assert all(a + b > 1000 for a, b in itertools.pairwise(sizes)), "more than needed"


@pytest.mark.parametrize("before", ["50GB", "1KB", "2KB"])
@pytest.mark.parametrize("after", ["50GB", "1KB"])
def test_a_model_saved_over_another_is_the_one_that_loads(before, after, tmp_path):
    random_model().save_pretrained(tmp_path, max_shard_size=before)
    (tmp_path / "tokenizer.json").write_text("mine")
    model = random_model()
    model.save_pretrained(tmp_path, max_shard_size=after)
    assert same(Model.from_pretrained(tmp_path), model)
    assert same(load_theirs(tmp_path).float(), load_theirs(tmp_path))
    model.save_pretrained(tmp_path / "new", max_shard_size=after)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == names | {"tokenizer.json", "new"}


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "5", "5TB", "GB", None])
def test_shard_size_is_checked_before_anything_is_written(size, tmp_path):
    with pytest.raises(InputError, match=f"max_shard_size must be .* got {size!r}"):
        random_model().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


# ---- what is refused

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
    """Before a model is made of them, or memory taken."""
    _, folder = saved
    rewrite(folder, change)
    if files == "shards":
        split(folder)
    monkeypatch.setattr("gpt2.weights.to_model", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(InputError, match=f"{folder}' .*{message}") as error:
        Model.from_pretrained(folder)
    assert "\n" not in str(error.value)


def split(folder):
    """The single file as two shards."""
    tensors = load_file(folder / interop.FILE)
    (folder / interop.FILE).unlink()
    where = {key: f"{'ab'[i % 2]}.safetensors" for i, key in enumerate(tensors)}
    for name in ("a.safetensors", "b.safetensors"):
        save_file({k: v for k, v in tensors.items() if where[k] == name}, folder / name)
    (folder / interop.INDEX).write_text(json.dumps({"weight_map": where}))


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
    where = json.loads((folder / interop.INDEX).read_text())["weight_map"]
    (folder / interop.INDEX).write_text(json.dumps(change(where)))
    with pytest.raises(InputError, match=message):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("size", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_absurd_sizes_allocate_nothing(size, saved):
    _, folder = saved
    reconfigure(folder, **{size: 2**40})
    with pytest.raises(InputError, match="must hold"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("name", [interop.CONFIG, interop.INDEX])
def test_json_of_any_size_is_not_read(name, saved):
    _, folder = saved
    if name == interop.INDEX:
        split(folder)
    (folder / name).write_text("[" * (2**20 + 1))
    with pytest.raises(InputError, match=f"{name}' must be JSON: at most 1048576 bytes are read"):
        Model.from_pretrained(folder)


def test_a_folder_without_weights_says_what_is_missing(saved):
    _, folder = saved
    (folder / interop.FILE).unlink()
    with pytest.raises(InputError, match=r"must hold model.safetensors or .*, got neither"):
        Model.from_pretrained(folder)
    with pytest.raises(InputError, match=r"model must be gpt2, .*, a folder .* got 'no/such'"):
        Model.from_pretrained("no/such")


def test_a_pickle_is_refused_with_the_command_that_converts_it(saved):
    """And that command does."""
    pytest.importorskip("transformers")
    model, folder = saved
    torch.save(load_file(folder / interop.FILE), folder / "pytorch_model.bin")
    Model.from_pretrained(folder)  # beside safetensors a pickle is no reason to refuse
    (folder / interop.FILE).unlink()
    with pytest.raises(InputError, match=r"got a pickle.*convert it: python -c") as error:
        Model.from_pretrained(folder)
    import shlex

    *_, python, flag, code = shlex.split(str(error.value).partition("convert it: ")[2])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert same(Model.from_pretrained(folder), model)
