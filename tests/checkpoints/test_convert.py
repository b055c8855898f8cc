"""Weights survive every format and back bit for bit, and only weights are accepted."""

import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_files import CONFIG, options, random_state, same, write
from safetensors.torch import load_file
from util import bits_equal

from gpt2 import Config, Model, loading
from gpt2.checkpoints import checkpoint, llmc, weights
from gpt2.checkpoints.convert import FORMATS, convert, described, read
from gpt2.cli import main
from gpt2.data import tokenizers
from gpt2.errors import InputError

# ---- round trips

PAIRS = list(itertools.permutations(FORMATS, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=map("-".join, PAIRS))
def test_there_and_back_is_exact(a, b, dtype, tmp_path):
    """All weights keep their bits and dtype, and all sizes are the same. Dropout is too, unless the
    file went through llm.c, which has none. The first and the last file have the same names, shapes
    and dtypes.
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
    """The tensors of a file as stored."""
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
    """A model from each format gives the same logits as the first, bit for bit."""
    model = Model(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(256, (2, 16))
    for format in FORMATS:
        (tmp_path / format).mkdir()
        path = write(CONFIG, model.to_state(), tmp_path / format, format)
        other = read(path)
        assert bits_equal(Model.from_state(other.config, other.state())(idx)[0], model(idx)[0])


# ---- runs


def test_a_converted_run_is_sampled_from_and_is_no_run_to_resume(tmp_path, capsys):
    state = Model(CONFIG).to_state()  # finite: other weights choose no token
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


# ---- llm.c

KINDS = [  # llm.c's ParameterTensors, in order
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


HEADERS = {  # int32 of the header -> expected message
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
def test_what_is_wrong_is_said_and_nothing_is_written(changes, message, tmp_path, monkeypatch):
    path = write(CONFIG, random_state(), tmp_path, "nanogpt")
    monkeypatch.chdir(path.parent)
    (path.parent / "full").mkdir()
    (path.parent / "full" / "mine").touch()
    alphabet = tokenizers.char(map(chr, range(1000, 1300)))
    (path.parent / "alphabet").write_text(alphabet.to_json())
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError, match=message):
        convert(**{"source": path, "dest": "new", "to": "hf", **changes})
    assert sorted(path.parent.rglob("*")) == before
