"""nanoGPT's ckpt.pt and build-nanogpt's checkpoints: all weights are read, and nothing else."""

import pickle
import sys
import types
import warnings
import zipfile
from dataclasses import dataclass, replace

import pytest
import torch
from checkpoint_files import CONFIG, random_state, same, write
from util import bits_equal

from gpt2 import Model, loading
from gpt2.checkpoints import weights
from gpt2.checkpoints.convert import convert, read
from gpt2.errors import InputError

# ---- nanoGPT


def rewrite(path, change):
    held = torch.load(path, weights_only=True)
    torch.save(change(held) or held, path)


@pytest.fixture
def ckpt(tmp_path):
    state = random_state()
    return write(CONFIG, state, tmp_path, "nanogpt"), state


def test_nanogpt_resumes_from_what_is_written(ckpt):
    """The fields that nanoGPT's train.py and sample.py read, with an AdamW of its two groups."""
    path, state = ckpt
    held = torch.load(path, weights_only=True)
    sizes = {"block_size": 16, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 8}
    assert held["model_args"] == {**sizes, "dropout": 0.25, "bias": True}
    assert (held["iter_num"], held["best_val_loss"], held["config"]) == (0, 1e9, {})
    assert held["model"]["lm_head.weight"].data_ptr() == held["model"][weights.WTE].data_ptr()
    model = Model(CONFIG)
    model.load_state_dict(held["model"], strict=True)
    assert same(model.to_state(), state)
    parameters = list(model.parameters())
    groups = [[p for p in parameters if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1.0, fused=True)
    optimizer.load_state_dict(held["optimizer"])
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("format", ["hf", "run", "llmc"])
def test_nanogpts_file_holds_the_weights_and_nothing_else(format, tmp_path):
    """torch.save writes the whole file behind a mapped tensor, including the optimizer's state."""
    path = write(CONFIG, random_state(), tmp_path, format)
    convert(path, tmp_path / "new.pt", "nanogpt", vocab_size=100)
    tensors = read(tmp_path / "new.pt").state().values()
    for tensor in tensors:
        assert tensor.is_contiguous()
    with zipfile.ZipFile(tmp_path / "new.pt") as archive:
        stored = sum(e.file_size for e in archive.infolist() if "/data/" in e.filename)
    assert stored == sum(tensor.nbytes for tensor in tensors)


def test_nanogpt_compiled_with_masks_an_optimizer_and_a_loss(ckpt):
    path, state = ckpt

    def change(held):
        tensors = {f"_orig_mod.{k}": v for k, v in held["model"].items()}
        tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in (0, 1)}
        moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(256, 8)}}
        held.update(model=tensors, best_val_loss=torch.tensor(1.5), config={"dataset": "x"})
        held["optimizer"]["state"] = moments

    rewrite(path, change)
    assert same(read(path).state(), state)


def test_nanogpt_without_biases_has_biases_of_zero(ckpt):
    path, state = ckpt

    def change(held):
        held["model_args"]["bias"] = False
        held["model"] = {k: v for k, v in held["model"].items() if not k.endswith(".bias")}

    rewrite(path, change)
    found = read(path).state()
    for name, tensor in found.items():
        zero = torch.zeros_like(state[name])
        assert bits_equal(tensor, zero if name.endswith(".bias") else state[name])
    rewrite(path, lambda held: held["model_args"].update(bias=True))
    with pytest.raises(InputError, match=r"missing: transformer.h.0.ln_1.bias, .* and 10 more"):
        read(path)


def test_nanogpts_head_is_tied(ckpt):
    path, _ = ckpt
    rewrite(path, lambda held: held["model"].update({"lm_head.weight": torch.zeros(256, 8)}))
    with pytest.raises(InputError, match="head that is tied"):
        read(path)


LN = "transformer.ln_f.weight"
CKPTS = {
    "list": (lambda h: [1], "must hold model, and model_args or config, got list"),
    "no-model": (
        lambda h: h.pop("model") and None,
        "must hold model, and model_args or config, got",
    ),
    "args-list": (
        lambda h: h.update(model_args=[1]),
        "must hold model, and model_args or config, got",
    ),
    "size-gone": (lambda h: h["model_args"].pop("n_head") and None, "must have n_head among"),
    "size": (lambda h: h["model_args"].update(n_embd=2**40), r"shape \(256, 1099511627776\)"),
    "layers": (lambda h: h["model_args"].update(n_layer=10**9), "weights of 1000000000 layers"),
    "text": (lambda h: h["model_args"].update(n_layer="2"), "n_layer must be an int, got '2'"),
    "fork": (lambda h: h["model_args"].update(use_rmsnorm=True), r"of a fork, got \['use_rms"),
    "bias": (lambda h: h["model_args"].update(bias=1), "bias must be True or False, got 1"),
    "missing": (lambda h: h["model"].pop(LN) is None, f"missing: {LN}; unexpected: none"),
    "unexpected": (lambda h: h["model"].update(x=torch.ones(1)), "unexpected: x"),
    "shape": (lambda h: h["model"].update({LN: torch.ones(9)}), rf"{LN} as .*\(9,"),
    "dtype": (lambda h: h["model"].update({LN: torch.ones(8).int()}), "got torch.int32"),
    "no-tensor": (lambda h: h["model"].update(x=1), "must hold tensors by name, got 'x'"),
    "view": (lambda h: h["model"].update({LN: torch.ones(1).expand(8)}), "every weight separately"),
}


@pytest.mark.parametrize(("change", "message"), CKPTS.values(), ids=CKPTS)
def test_a_ckpt_that_does_not_fit_is_refused_by_name(change, message, ckpt):
    path, _ = ckpt
    rewrite(path, change)
    with pytest.raises(InputError, match=f"nanoGPT's '{path}'.*{message}"):
        read(path)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("call", [(print, "pwned"), (bytearray, 10**8), (torch.FloatTensor, 9)])
def test_a_pickle_that_asks_for_more_than_tensors_is_not_run(call, protocol, ckpt, capsys):
    """PyTorch's own unpickler would allocate the large bytearray."""
    path, _ = ckpt
    good = zipfile.ZipFile(path)
    entries = {info.filename: good.read(info) for info in good.infolist()}
    with zipfile.ZipFile(path, "w") as bad:
        for name, data in entries.items():
            evil = pickle.dumps({"model": {}, "x": Evil(*call)}, protocol)
            bad.writestr(name, evil if name.endswith("data.pkl") else data)
    with pytest.raises(InputError, match=r"cannot be read: its pickle (asks for|has STACK_GLOBAL)"):
        read(path)
    assert capsys.readouterr().out == ""


def test_an_archive_larger_than_its_file_is_refused(ckpt):
    path, _ = ckpt
    good = zipfile.ZipFile(path)
    entries = {info.filename: good.read(info) for info in good.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bad:
        for name, data in entries.items():
            bad.writestr(name, data)
    with pytest.raises(InputError, match="got a compressed one"):
        read(path)


def test_a_bare_pickle_is_no_model(tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(InputError, match=r"nanoGPT's ckpt.pt or llm.c's model.bin, got"):
        read(path)


# ---- build-nanogpt


def build_nanogpt(path, state, monkeypatch, module="__main__", prefix="", **more):
    """Writes a checkpoint as build-nanogpt's train_gpt2.py does: config is an object."""

    @dataclass
    class GPTConfig:
        block_size: int = 16
        vocab_size: int = 256
        n_layer: int = 2
        n_head: int = 2
        n_embd: int = 8

    GPTConfig.__module__, GPTConfig.__qualname__ = module, "GPTConfig"
    holder = sys.modules.get(module) or types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, holder)
    monkeypatch.setattr(holder, "GPTConfig", GPTConfig, raising=False)
    model = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    model[f"{prefix}{weights.HEAD}"] = model[f"{prefix}{weights.WTE}"]
    for i in (0, 1):
        model[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)
    config = GPTConfig()
    for name, value in more.items():
        setattr(config, name, value)
    torch.save({"model": model, "config": config, "step": 100, "val_loss": 3.2}, path)
    monkeypatch.delattr(holder, "GPTConfig")
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
def test_build_nanogpt_s_checkpoints(module, prefix, tmp_path, monkeypatch):
    """They were refused because of the class of config. It is still never looked up."""
    state = random_state()
    path = build_nanogpt(tmp_path / "model_00100.pt", state, monkeypatch, module, prefix)
    model = read(path)
    assert (model.format, model.gelu) == ("nanogpt", "tanh")
    assert model.config == replace(CONFIG, dropout=0.0)
    assert same(model.state(), state)
    with warnings.catch_warnings(action="error"):
        loading.load(path, tokenizer="byte")


def test_nanogpt_s_own_config_object_means_erf(tmp_path, monkeypatch):
    path = build_nanogpt(tmp_path / "x.pt", random_state(), monkeypatch, bias=True, dropout=0.1)
    model = read(path)
    assert model.gelu == "erf" and model.config.dropout == 0.1


def test_a_config_object_that_is_no_configuration_is_refused(tmp_path, monkeypatch):
    def saved(**more):
        return build_nanogpt(tmp_path / "x.pt", random_state(), monkeypatch, **more)

    for more, message in (
        ({"n_layer": "2"}, "n_layer must be an int, got '2'"),
        ({"n_embd": 2**40}, r"shape \(256, 1099511627776\)"),
        ({"use_rope": True}, r"model_args of a fork, got \['use_rope'\]"),
        ({"x": [1]}, "of a fork"),
    ):
        with pytest.raises(InputError, match=message):
            read(saved(**more))


class GPTConfig:
    """A class whose pickle would run a function."""

    def __reduce__(self):
        return print, ("pwned",)


def test_a_config_object_with_a_function_is_not_run(ckpt, capsys):
    path, _ = ckpt
    rewrite(path, lambda held: None)
    good = zipfile.ZipFile(path)
    entries = {info.filename: good.read(info) for info in good.infolist()}
    calls = {
        "asks for": pickle.dumps({"model": {}, "config": GPTConfig()}, 2),
        "cannot be read": b"\x80\x02c__main__\nGPTConfig\nK\x05\x85R.",
    }
    for message, evil in calls.items():
        with zipfile.ZipFile(path, "w") as bad:
            for name, data in entries.items():
                bad.writestr(name, evil if name.endswith("data.pkl") else data)
        with pytest.raises(InputError, match=message):
            read(path)
    assert capsys.readouterr().out == ""


def test_a_weight_with_and_without_prefix_is_refused(ckpt):
    path, _ = ckpt
    rewrite(path, lambda held: held["model"].update({f"module.{LN}": held["model"][LN]}))
    with pytest.raises(InputError, match=f"must hold {LN} once"):
        read(path)
