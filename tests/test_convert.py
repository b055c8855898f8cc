"""Weights through every format and back, to the bit; and nothing of a file that is not weights."""

import itertools
import pickle
import struct
import sys
import types
import warnings
import zipfile
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from util import bits_equal

from gpt2 import Config, Model, checkpoint, llmc, loading, nanogpt, weights
from gpt2 import tokenizer as tokenizers
from gpt2.cli import main
from gpt2.convert import FORMATS, convert, described, read
from gpt2.errors import InputError

CONFIG = Config(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=8, dropout=0.25)


def random_state(config=CONFIG, dtype=torch.float32):
    """Bits of every kind but NaN's: zeros of both signs, the largest, the smallest."""
    state = {}
    for name, shape in weights.shapes(config).items():
        tensor = torch.randn(shape).to(dtype)
        info = torch.finfo(dtype)
        special = torch.tensor([-0.0, info.max, info.tiny, info.tiny / 4]).to(dtype)
        tensor.view(-1)[:4] = special[: tensor.numel()]
        state[name] = tensor
    return state


def write(config, state, folder, format):
    """A model in a format of which `convert` writes every other."""
    nanogpt.write(config, state, folder / "ckpt.pt")
    if format == "nanogpt":
        return folder / "ckpt.pt"
    convert(folder / "ckpt.pt", folder / format, format, **options(format))
    return folder / format


def options(format):
    return {"tokenizer": "byte"} if format == "run" else {}


def same(a, b):
    return a.keys() == b.keys() and all(bits_equal(a[name], b[name]) for name in a)


# ---- round trips

PAIRS = list(itertools.permutations(FORMATS, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=map("-".join, PAIRS))
def test_there_and_back_is_exact(a, b, dtype, tmp_path):
    """Every weight, to the bit and in its dtype; every size; dropout, unless llm.c was between,
    which has none. The names, shapes and dtypes in the first file and the last are the same, too.
    """
    state = random_state(dtype=getattr(torch, dtype))
    first = write(CONFIG, state, tmp_path, a)
    convert(first, tmp_path / "there", b, **options(b))
    convert(tmp_path / "there", tmp_path / "back", a, **options(a))
    for n, path in enumerate((first, tmp_path / "there", tmp_path / "back")):
        model = read(path)
        dropout = 0.0 if "llmc" in (a, b)[: n + 1] else CONFIG.dropout
        assert model.config == replace(CONFIG, dropout=dropout)
        assert same(model.state(), state), path
    assert same(contents(first, a), contents(tmp_path / "back", a))


def contents(path, format):
    """The tensors in a file as it stores them."""
    match format:
        case "hf":
            return load_file(path / "model.safetensors")
        case "run":
            return load_file(path / checkpoint.FILE)
        case "nanogpt":
            return torch.load(path, weights_only=True)["model"]
    return {"all": torch.from_numpy(np.fromfile(path, np.uint8))}


def test_bfloat16_weights_through_float32_are_exact_and_others_are_rounded_if_asked(tmp_path):
    state = random_state(dtype=torch.bfloat16)
    first = write(CONFIG, state, tmp_path, "llmc")
    convert(first, tmp_path / "wide", "llmc", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "narrow", "llmc", dtype="bfloat16")
    assert first.read_bytes() == (tmp_path / "narrow").read_bytes()
    assert [struct.unpack_from("<2i", p.read_bytes())[1] for p in (first, tmp_path / "wide")] == [
        5,
        3,
    ]
    convert(tmp_path / "wide", tmp_path / "half", "hf", dtype="float16")
    assert {t.dtype for t in read(tmp_path / "half").state().values()} == {torch.float16}
    with pytest.raises(InputError, match="must all be float32 or all bfloat16, got float16"):
        convert(tmp_path / "half", tmp_path / "no", "llmc")
    assert not (tmp_path / "no").exists()


def test_every_format_computes_the_same(tmp_path):
    """Not only the same names: a model of each gives the logits of the first, to the bit."""
    model = Model(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(256, (2, 16))
    for format in FORMATS:
        (tmp_path / format).mkdir()
        path = write(CONFIG, weights.of_model(model), tmp_path / format, format)
        other = read(path)
        assert bits_equal(weights.to_model(other.config, other.state())(idx)[0], model(idx)[0])


# ---- runs


def test_a_converted_run_is_sampled_from_and_is_no_run_to_resume(tmp_path, capsys):
    state = weights.of_model(Model(CONFIG))  # finite: others choose no token
    run = write(CONFIG, state, tmp_path, "run")
    model, tokenizer = loading.load(run)
    assert tokenizer.name == "byte" and model.config == CONFIG
    assert main(["sample", str(run), "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert main(["train", "--resume", str(run)]) == 2
    assert "got converted weights, which --init trains" in capsys.readouterr().err


def test_a_padded_vocabulary_stays_unless_it_is_cropped(tmp_path, capsys):
    padded = Config(block_size=4, vocab_size=50304, n_layer=1, n_head=1, n_embd=2)
    state = random_state(padded)
    ckpt = str(write(padded, state, tmp_path, "nanogpt"))
    assert main(["convert", ckpt, str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert read(tmp_path / "hf").config.vocab_size == 50304
    assert main(["convert", ckpt, str(tmp_path / "run"), "--to", "run"]) == 2
    line = capsys.readouterr().err
    assert "vocab_size 50304, got 50257 ids; " in line and "--vocab-size crops" in line
    assert not (tmp_path / "run").exists()
    flags = ["--to", "run", "--vocab-size", "50257"]
    assert main(["convert", ckpt, str(tmp_path / "run"), *flags]) == 0
    run = read(tmp_path / "run")
    assert bits_equal(run.state()[weights.WTE], state[weights.WTE][:50257])
    text, size = described(tmp_path / "run" / tokenizers.FILE)
    assert (text, size) == ('{"name": "gpt2"}\n', 50257)


def test_a_run_keeps_its_tokenizer_through_a_copy(tmp_path):
    config = Config(block_size=4, vocab_size=3, n_layer=1, n_head=1, n_embd=2)
    checkpoint.write(tmp_path / checkpoint.FILE, config, random_state(config), step=7)
    (tmp_path / tokenizers.FILE).write_text(tokenizers.char("abc").to_json())
    convert(tmp_path, tmp_path / "copy", "run")
    assert loading.load(tmp_path / "copy")[1].decode([0, 1, 2]) == "abc"
    with pytest.raises(InputError, match="must fit the model's vocab_size 2, got 3 ids; --tok"):
        convert(tmp_path, tmp_path / "cropped", "run", vocab_size=2)


# ---- nanoGPT


def rewrite(path, change):
    held = torch.load(path, weights_only=True)
    torch.save(change(held) or held, path)


@pytest.fixture
def ckpt(tmp_path):
    state = random_state()
    return write(CONFIG, state, tmp_path, "nanogpt"), state


def test_nanogpt_resumes_from_what_is_written(ckpt):
    """What its train.py and sample.py take out of the file, and an AdamW of its two groups."""
    path, state = ckpt
    held = torch.load(path, weights_only=True)
    sizes = {"block_size": 16, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 8}
    assert held["model_args"] == {**sizes, "dropout": 0.25, "bias": True}
    assert (held["iter_num"], held["best_val_loss"], held["config"]) == (0, 1e9, {})
    assert held["model"]["lm_head.weight"].data_ptr() == held["model"][weights.WTE].data_ptr()
    model = Model(CONFIG)
    model.load_state_dict(held["model"], strict=True)
    assert same(weights.of_model(model), state)
    parameters = list(model.parameters())
    groups = [[p for p in parameters if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1.0, fused=True)
    optimizer.load_state_dict(held["optimizer"])
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("format", ["hf", "run", "llmc"])
def test_nanogpts_file_holds_the_weights_and_nothing_else(format, tmp_path):
    """torch.save writes the whole file that a tensor is mapped from: the optimizer's state, too."""
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
    "view": (lambda h: h["model"].update({LN: torch.ones(1).expand(8)}), "every weight whole"),
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
    """PyTorch's own unpickler would make the large bytearray."""
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
    """A checkpoint as build-nanogpt's train_gpt2.py writes it: config is an object."""

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
    """They were refused: the class of config was not looked at, and is not looked up now either."""
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
    """One whose pickle would run a function."""

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


# ---- llm.c

KINDS = [  # llm.c's ParameterTensors, in their order
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"),
    *("attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"),
    *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
]


@pytest.mark.parametrize("version", [3, 5])
def test_llmc_s_file_byte_by_byte(version, tmp_path):
    config = Config(block_size=5, vocab_size=130, n_layer=3, n_head=2, n_embd=4)
    dtype = {3: torch.float32, 5: torch.bfloat16}[version]
    state = random_state(config, dtype)
    blocks = [state[f"transformer.h.{i}.{kind}"] for kind in KINDS for i in range(3)]
    outer = [state[f"transformer.{k}"] for k in ("wte.weight", "wpe.weight")]
    norm = [state[f"transformer.ln_f.{k}"] for k in ("weight", "bias")]
    padding = torch.zeros(126, 4, dtype=dtype)
    tensors = [outer[0], padding, outer[1], *blocks, *norm]
    header = struct.pack("<256i", 20240326, version, 5, 130, 3, 2, 4, 256, *[0] * 248)
    expected = header + b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors)
    llmc.write(config, state, tmp_path / "model.bin")
    assert (tmp_path / "model.bin").read_bytes() == expected
    model = read(tmp_path / "model.bin")
    assert (model.format, model.config) == ("llmc", config)
    assert same(model.state(), state)


def test_llmc_s_padding_is_left_out_whatever_it_holds(tmp_path):
    config = Config(block_size=2, vocab_size=3, n_layer=1, n_head=1, n_embd=2)
    state = random_state(config)
    llmc.write(config, state, tmp_path / "model.bin")
    data = bytearray((tmp_path / "model.bin").read_bytes())
    data[1024 + 3 * 8 : 1024 + 128 * 8] = b"\xff" * (125 * 8)
    (tmp_path / "model.bin").write_bytes(data)
    assert same(read(tmp_path / "model.bin").state(), state)


HEADERS = {  # int32 of the header -> what is said
    (1, 2): "must have version 3 .* or 5 .*, got 2",
    (2, 0): "block_size must be at least 1, got 0",
    (3, 257): "padded vocabulary of at least 257, got 256",
    (4, 2**31 - 1): "must have [0-9]+ bytes, as its header says, got",
    (5, 3): "n_embd must be divisible by n_head, got n_embd=8, n_head=3",
    (6, -8): "n_embd must be at least 1, got -8",
    (7, 384): "must have [0-9]+ bytes, as its header says, got",
}


@pytest.mark.parametrize(("field", "message"), HEADERS.items(), ids=str)
def test_an_llmc_header_that_does_not_fit_is_refused(field, message, tmp_path):
    path = write(CONFIG, random_state(), tmp_path, "llmc")
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 4 * field[0], field[1])
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"llm.c's '{path}'.*{message}"):
        read(path)


@pytest.mark.parametrize("size", [4, 1000, 1024, 5000, -1])
def test_a_truncated_llmc_file_is_refused(size, tmp_path):
    path = write(CONFIG, random_state(), tmp_path, "llmc")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"header of 256 int32|bytes, as its header says"):
        read(path)


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "onnx"}, "to must be one of hf, run, nanogpt, llmc, got 'onnx'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"vocab_size": 257}, "vocab_size must be 1 to 256, the model's own, got 257"),
        ({"vocab_size": 0}, "vocab_size must be 1 to 256, .* got 0"),
        ({"to": "llmc", "tokenizer": "byte"}, "must be absent: format llmc has none, got 'byte'"),
        ({"tokenizer": "alphabet"}, "at most the model's 256 ids, got 300; --tokenizer names"),
        ({"to": "run"}, "tokenizer must fit the model's vocab_size 256, got 50257 ids; --tok"),
        ({"to": "run", "tokenizer": "char"}, "tokenizer must be byte, gpt2, a file"),
        ({"to": "llmc", "max_shard_size": "1GB"}, "max_shard_size must be absent for format llmc"),
        ({"max_shard_size": "1TB"}, "max_shard_size must be a number of bytes"),
        ({"source": "none"}, "model must be gpt2, .* got 'none'"),
        ({"dest": "full"}, "dest must be a new or empty folder, got 'full'"),
        ({"dest": "full", "to": "llmc"}, "dest must be new, got .*full', which exists"),
        ({"dest": "full/mine/bin", "to": "llmc"}, "dest must be a folder that can be written"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(changes, message, ckpt, monkeypatch):
    path, _ = ckpt
    monkeypatch.chdir(path.parent)
    (path.parent / "full").mkdir()
    (path.parent / "full" / "mine").touch()
    alphabet = tokenizers.char(map(chr, range(1000, 1300)))
    (path.parent / "alphabet").write_text(alphabet.to_json())
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError, match=message):
        convert(**{"source": path, "dest": "new", "to": "hf", **changes})
    assert sorted(path.parent.rglob("*")) == before
