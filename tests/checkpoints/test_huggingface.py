"""Reads and writes Hugging Face's GPT-2: equal to transformers, complete or refused, never
pickled."""

import itertools
import json

import pytest
import torch
from huggingface_models import SMALL, random_model, reconfigure, rewrite, same, their_model
from safetensors import safe_open
from safetensors.torch import load_file
from util import bits_equal

from gpt2 import Config, Model
from gpt2.checkpoints import huggingface
from gpt2.errors import InputError

SIZES = {"small": SMALL, "124M": Config.named("gpt2")}
SIZES = [
    pytest.param(config, id=name, marks=pytest.mark.full if name == "124M" else ())
    for name, config in SIZES.items()
]


def load_theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")


def assert_equal_models(ours, theirs):
    """Every weight bit for bit; logits, loss and every gradient in float64."""
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
    """Equal up to the rounding of sums in another order."""
    bound = 64 * torch.finfo(ours.dtype).eps * theirs.abs().max().clamp(min=1)
    assert (ours - theirs).abs().max() <= bound, name


def as_ours(name, weight):
    """transformers stores the four projections as (in, out)."""
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return weight.T.contiguous() if name.endswith(projections) else weight


# ---- parity


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("files", ["one-file", "shards"])
def test_loads_what_transformers_save(files, config, tmp_path):
    theirs = their_model(config)
    size = sum(p.nbytes for p in theirs.parameters())
    theirs.save_pretrained(tmp_path, max_shard_size="50GB" if files == "one-file" else size // 2)
    assert (tmp_path / huggingface.INDEX).exists() == (files == "shards")
    assert_equal_models(Model.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("files", ["one-file", "shards"])
def test_transformers_load_what_is_saved(files, config, tmp_path):
    ours = random_model(config)
    size = sum(p.nbytes for p in ours.parameters())
    ours.save_pretrained(tmp_path, max_shard_size="50GB" if files == "one-file" else size // 2)
    assert (tmp_path / huggingface.INDEX).exists() == (files == "shards")
    theirs = load_theirs(tmp_path)
    assert theirs.config.n_positions == config.block_size
    assert_equal_models(ours, theirs)


def short(tensors):
    """The keys and masks of the published gpt2."""
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
    assert {t.dtype for t in load_file(tmp_path / huggingface.FILE).values()} == {torch.bfloat16}
    assert load_theirs(tmp_path).dtype == torch.bfloat16


def test_a_loaded_model_is_tied_in_eval_mode_and_owns_its_memory(saved):
    model, folder = saved
    loaded = Model.from_pretrained(folder, fast=True)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.fast and not loaded.training
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    with open(folder / huggingface.FILE, "r+b") as file:  # in place: a mapped file would change
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
    found = json.loads((folder / huggingface.CONFIG).read_text())
    for ours, theirs in (("n_embd", "hidden_size"), ("n_head", "num_attention_heads")):
        found[theirs] = found.pop(ours)
    (folder / huggingface.CONFIG).write_text(json.dumps(found))
    assert Model.from_pretrained(folder).config == model.config
    (folder / huggingface.CONFIG).write_text("{}")
    assert huggingface.read_config(folder) == Config(1024, 50257, 12, 12, 768, 0.1)


# ---- saving


def test_a_file_says_pt_and_nothing_else_is_left(saved):
    _, folder = saved
    assert {path.name for path in folder.iterdir()} == {huggingface.CONFIG, huggingface.FILE}
    with safe_open(folder / huggingface.FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (folder / "other").touch()
    assert (folder / huggingface.FILE).stat().st_mode == (folder / "other").stat().st_mode


def test_shards_hold_at_most_what_is_asked_for_and_the_index_says_where(saved):
    model, folder = saved
    model.save_pretrained(folder / "shards", max_shard_size="1KB")
    index = json.loads((folder / "shards" / huggingface.INDEX).read_text())
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
