"""Checkpoints are exact, complete or absent, the same for wrapped models, and never trusted."""

import os
import re
import struct

import pytest
import torch
from checkpoint_files import rewritten
from kill_saves import kill_saves
from safetensors.torch import load_file, save_file

from gpt2.checkpoints import checkpoint
from gpt2.config import Config
from gpt2.errors import InputError
from gpt2.model import Model
from gpt2.train import optim

CONFIG = Config(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


def trained(steps: int = 2, config: Config = CONFIG):
    model = Model(config)
    optimizer = optim.adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(steps):
        x = torch.randint(config.vocab_size, (2, 8))
        model(x, x)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, model, optimizer, step=2, train_tokens=100)
    return path, model, optimizer


def test_round_trip_is_exact(saved):
    path, model, optimizer = saved
    config, progress = checkpoint.read(path)
    assert config == CONFIG
    assert progress == {"step": 2, "train_tokens": 100}
    again, optimizer_again = trained(steps=1)
    checkpoint.load(path, again, optimizer_again)
    assert same(model, again)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        before, after = optimizer.state[p], optimizer_again.state[q]
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert all(before[k].dtype == after[k].dtype for k in before)


def test_optimizer_that_has_not_stepped_round_trips(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, *trained(steps=0), step=0)
    model, optimizer = trained(steps=1)
    checkpoint.load(path, model, optimizer)
    assert not optimizer.state


def test_a_file_has_gpt2_names_tied_weights_once_and_ordinary_permissions(saved):
    path, model, _ = saved
    weights = {k for k in load_file(path) if not k.startswith("optimizer.")}
    assert weights == set(model.state_dict()) - {"lm_head.weight"}
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


class DataParallelLike(torch.nn.Module):
    """Names parameters as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, module.config


WRAPPERS = {
    "eager": lambda model: model,
    "compiled": torch.compile,
    "ddp": DataParallelLike,
    "ddp-of-compiled": lambda model: DataParallelLike(torch.compile(model)),
}


@pytest.mark.parametrize("written", WRAPPERS)
@pytest.mark.parametrize("read", WRAPPERS)
def test_wrapped_models_load_each_others_files(written, read, tmp_path):
    """A prefix in the keys, such as `_orig_mod.`, made checkpoints unreadable without the
    wrapper."""
    path = tmp_path / "checkpoint.safetensors"
    (model, optimizer), (other, other_optimizer) = trained(), trained(1)
    checkpoint.save(path, WRAPPERS[written](model), optimizer, step=2)
    checkpoint.load(path, WRAPPERS[read](other), other_optimizer)
    assert same(model, other)
    wte, other_wte = model.lm_head.weight, other.lm_head.weight
    exp_avg = [optimizer.state[wte], other_optimizer.state[other_wte]]
    assert torch.equal(exp_avg[0]["exp_avg"], exp_avg[1]["exp_avg"])


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [{}, {"lm_head.weight"}, {"transformer.wte.weight"}], ids=str)
def test_state_dicts_of_others_load(prefix, tied, tmp_path):
    """With a wrapper's prefix, and with the tied weight under either name or both."""
    model, _ = trained()
    state = {prefix + k: v.clone() for k, v in model.state_dict().items() if k not in tied}
    save_file(state, tmp_path / "weights.safetensors")
    other = Model(CONFIG)
    checkpoint.load(tmp_path / "weights.safetensors", other)
    assert same(model, other)


WTE, EXP_AVG = "transformer.wte.weight", "optimizer.exp_avg.transformer.wte.weight"
BROKEN = {
    "weight-missing": (lambda t, d: t.pop(WTE), "missing: transformer.wte.weight"),
    "weight-unknown": (lambda t, d: t.update(x=torch.zeros(1)), "unexpected: x"),
    "weight-shape": (lambda t, d: t.update({WTE: torch.zeros(8, 11)}), r"wte.* of shape \(11, 8\)"),
    "weight-dtype": (lambda t, d: t.update({WTE: t[WTE].long()}), "as floats"),
    "state-missing": (lambda t, d: t.pop(EXP_AVG), "must hold exp_avg of transformer.wte"),
    "state-unknown": (lambda t, d: t.update({"optimizer.x": torch.zeros(1)}), "optimizer.x"),
    "state-shape": (
        lambda t, d: t.update({EXP_AVG: torch.zeros(3)}),
        r"exp_avg.* of shape \(11, 8\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_does_not_fit_changes_nothing(saved, change, message):
    path, *_ = saved
    rewritten(path, change)
    model, optimizer = trained(1)
    weights = [p.clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    with pytest.raises(InputError, match=rf"checkpoint '{path}' .*{message}"):
        checkpoint.load(path, model, optimizer)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(
        torch.equal(m, optimizer.state[p]["exp_avg"])
        for m, p in zip(moments, model.parameters(), strict=True)
    )


ABSURD = {
    "layers": {"n_layer": 10**12},
    "width": {"n_embd": 2**40, "n_head": 2},
    "vocabulary": {"vocab_size": 2**40},
    "block": {"block_size": 2**40},
    "zero": {"n_layer": 0},
    "text": {"n_layer": "2"},
    "unknown-field": {"x": 1},
}


@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD)
def test_a_configuration_that_is_absurd_allocates_nothing(saved, fields):
    path, *_ = saved
    rewritten(path, lambda tensors, description: description["config"].update(fields))
    with pytest.raises(InputError, match="checkpoint "):
        checkpoint.read(path)


@pytest.mark.parametrize("step", [-1, "2", None, 1.5])
def test_absurd_step_is_refused(saved, step):
    path, *_ = saved
    rewritten(path, lambda tensors, description: description.update(step=step))
    with pytest.raises(InputError, match="must have metadata"):
        checkpoint.read(path)


HOSTILE = {
    "empty": lambda good: b"",
    "header-only": lambda good: good[:8],
    "cut-header": lambda good: good[:100],
    "cut-data": lambda good: good[:-1],
    "trailing-data": lambda good: good + b"\0",
    "huge-header": lambda good: struct.pack("<Q", 2**62) + good[8:],
    "large-header": lambda good: struct.pack("<Q", 99_000_000) + good[8:],
    "not-json": lambda good: struct.pack("<Q", 8) + b"notjson " + good,
    "offsets": lambda good: good.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    "shape": lambda good: good.replace(b'"shape":[8]', b'"shape":[9]', 1),
    "pickle": lambda good: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
    "no-description": lambda good: good.replace(b'"gpt2":', b'"gpt3":', 1),
}


@pytest.mark.parametrize("broken", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_by_name(saved, broken):
    path, *_ = saved
    good = path.read_bytes()
    path.write_bytes(broken(good))
    assert path.read_bytes() != good
    with pytest.raises(InputError, match=f"checkpoint '{path}'"):
        checkpoint.read(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_no_file_is_refused_by_name(kind, tmp_path):
    path = tmp_path if kind == "folder" else tmp_path / "none"
    with pytest.raises(InputError, match=f"checkpoint '{path}' cannot be read"):
        checkpoint.read(path)


UNPICKLES = re.compile(r"import pickle|torch\.save|torch\.load|(?<![\w.])(?:eval|exec)\(")


def test_no_pickle_anywhere():
    """Except for nanoGPT's files: a model is read by PyTorch's unpickler for weights, an alphabet
    by an unpickler that looks nothing up."""
    import gpt2

    sources = os.path.join(os.path.dirname(gpt2.__file__))
    for name in os.listdir(sources):
        if name.endswith(".py"):
            with open(os.path.join(sources, name), encoding="utf-8") as file:
                text = file.read()
            if name == "nanogpt.py":
                load = 'torch.load(path, map_location="cpu", mmap=True, weights_only=True)'
                assert text.count(load) == 1
                text = text.replace(load, "").replace("torch.save", "")
            if name == "nanogpt_meta.py":
                load = "_Plain(io.BytesIO(data)).load()"
                assert text.count(load) == 1 and text.count("pickle.Unpickler") == 1
                text = text.replace("import pickle", "").replace("pickle.Unpickler", "")
            assert not UNPICKLES.search(text), f"{name}: {UNPICKLES.search(text)}"


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.full)])
def test_killed_in_mid_save_leaves_a_whole_checkpoint(kills, tmp_path):
    """Killing a program that wrote in place left 56 of 60 files unreadable."""
    outcome = kill_saves(tmp_path, kills)
    assert outcome.flawless and outcome.kills == kills, outcome
    assert outcome.inside, "no kill fell into a save: the test proves nothing"
