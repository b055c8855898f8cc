"""Sixty mistakes of users, on the command line and in Python: each gives one line with what was
expected and what was given, and changes no file."""

import hashlib

import numpy as np
import pytest
import torch

from gpt2 import Config, Model, kernels
from gpt2.checkpoints import checkpoint, convert
from gpt2.cli import main
from gpt2.data import batches, tokenizers
from gpt2.evaluate import scoring
from gpt2.generate import decoding
from gpt2.generate import quantize as int8
from gpt2.generate.completion import complete
from gpt2.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

CONFIG = Config(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=8)
NEW = ("--steps", "2", "--batch-size", "2", "--block-size", "8", "--device", "cpu")


def contents(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, a text, and files that are in the way."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "text.txt").write_text("the cat sat on the mat. " * 40)
        (folder / "mine").write_text("precious")
        (folder / "prompts.txt").write_text("one\n")
        (folder / "questions").write_text('{"ctx": "a", "endings": ["b"], "label": 0}\n')
        np.arange(500, dtype="<u2").tofile(folder / "ids.bin")
        flags = ("--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--tokenizer", "byte")
        command = ("train", "--data", "text.txt", "--out", "run", "--sample-tokens", "0")
        assert main([*command, *flags, *NEW]) == 0
    return folder


@pytest.fixture
def untouched(made, monkeypatch):
    """Runs a test in the folder, and checks afterwards that no file has changed."""
    monkeypatch.chdir(made)
    before = contents(made)
    yield made
    assert contents(made) == before


COMMANDS = {
    # command: expected message
    "trian": "invalid choice: 'trian'",
    "train --epochs 3": "unrecognized arguments: --epochs 3",
    "train --lr": "argument --lr: expected one argument",
    "train --lr 1e-4,": "argument --lr: invalid float value: '1e-4,'",
    "train --data txet.txt": "data must be a file, a folder with files, .* got 'txet.txt'",
    "train --data text.txt --out mine": "out must be a folder that can be written, got 'mine'",
    "train --data text.txt --out run": "out must be a new or empty folder, got 'run'",
    "train --data ids.bin --tokenizer byte": "must hold ids below vocab_size 256, got 256",
    "train --n-embd 100 --n-head 3": "n_embd must be divisible by n_head, .*n_head=3",
    "train --block-size 0": "block_size must be at least 1, got 0",
    "train --n-layer 10000000000": "n_layer and n_embd must be smaller, got 10000000000",
    "train --resume nur": "resume must be the folder of a run, got 'nur'",
    "train --resume run": "steps must be above the 2 done, got 2",
    "train --resume run --seed 3": "seed cannot be changed by --resume, got 3",
    "train --init gtp2": "model must be gpt2, gpt2-medium, .* got 'gtp2'",
    "train --device gpu": "device must be auto or one that works here, got 'gpu'",
    "train --device hpu": "device must be auto or one that works here, got 'hpu'",
    "train --device privateuseone": "device must be auto or .* got 'privateuseone'",
    "train --dtype float16": "dtype must be auto or float32 or bfloat16, got 'float16'",
    "sample": "the following arguments are required: MODEL",
    "sample nur": "model must be gpt2, .* got 'nur'",
    "sample run --stop \\q": r"stop must have no escapes .* got \\q in \\q",
    "sample run --prompt a --prompts prompts.txt": "argument --prompts: not allowed with argum",
    "sample run --prompts none.txt": "prompts 'none.txt' cannot be read: No such file",
    "sample run --temperature nan": "temperature must be finite and at least 0, got nan",
    "sample run --quantize int4": "quantize must be int8 or absent, got int4",
    "eval run": "data or choices must be given, got neither",
    "eval run --choices questions": "choices 'questions', line 1: endings must be at least 2",
    "eval run --data text.txt --stride 9": "stride must be 1 to context 8, got 9",
    "convert run mine --to nanogpt": "dest must be new, got '.*mine', which exists",
    "convert run new --to gguf": "to must be one of hf, run, nanogpt, llmc, got 'gguf'",
    "convert run new --to hf --max-shard-size " + "9" * 5000 + "GB": "max_shard_size must be a .*…",
    "sample run --top-k " + "9" * 5000: "argument --top-k: invalid int value: '9+…$",
    "sample run --" + "x" * 5000: "unrecognized arguments: --x+…$",
    "prepare text.txt --out mine --tokenizer byte": "out must be new, got '.*mine', which exists",
    "prepare text.txt --out new --val-fraction 2 --tokenizer byte": "val_fraction must be above 0",
    "tokenizer text.txt --vocab-size 300 --out mine": "out must be new, got '.*mine', which exists",
}


@pytest.mark.parametrize(("command", "line"), COMMANDS.items(), ids=[c[:60] for c in COMMANDS])
def test_a_mistake_at_the_command_line(command, line, untouched, capsys):
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = printed.err.splitlines()
    assert error.startswith("gpt2: error: ") and len(error) < 500
    with pytest.raises(ValueError, match=line):
        raise ValueError(error)


@pytest.mark.parametrize("flag", ["--batch-size", "--context", "--stride"])
def test_a_number_beyond_64_bits(flag, untouched, capsys):
    """islice raised a ValueError. Such a number of windows must mean all of them."""
    code = main(["eval", "run", "--data", "text.txt", flag, "9" * 20])
    assert code == (0 if flag == "--batch-size" else 2)
    assert "Traceback" not in capsys.readouterr().err


def model(**changes):
    return Model(Config(**{**vars(CONFIG), **changes})).eval()


def ids(*shape):
    return torch.ones(shape, dtype=torch.int64)


def in_int8():
    return int8.quantize_int8(model())


X = torch.zeros(2, 3, 8)
PYTHON = {
    # code: expected message of the exception
    "Config, a string": (lambda: Config(n_layer="2"), "n_layer must be an int, got '2'"),
    "Config, no such size": (lambda: Config.named("gpt3"), "name must be one of gpt2, .*'gpt3'"),
    "Model, a dict": (lambda: Model({"n_layer": 2}), "config must be a Config, got dict"),
    "idx, a list": (lambda: model()([[1]]), "idx must be an int64 tensor, got list"),
    "idx, one dimension": (lambda: model()(ids(3)), r"idx must have shape \(B, T\), got \(3,\)"),
    "idx, too long": (lambda: model()(ids(1, 9)), "at most block_size=8 tokens long, got T=9"),
    "idx, another vocabulary": (lambda: model()(300 * ids(1, 2)), r"idx must lie in \[0, 256\)"),
    "targets, floats": (
        lambda: model()(ids(1, 2), torch.ones(1, 2)),
        "targets must be an int64 tensor, got torch.float32",
    ),
    "targets, a list": (lambda: model()(ids(1, 1), [[1]]), "targets must be an int64 tensor"),
    "targets, shifted": (
        lambda: model()(ids(1, 3), ids(1, 2)),
        r"targets must have idx's shape \(1, 3\), got \(1, 2\)",
    ),
    "generate, temperature": (
        lambda: model().generate(ids(1, 1), 1, temperature=None),
        "temperature must be a number, got None",
    ),
    "generate, top_k": (
        lambda: model().generate(ids(1, 1), 1, top_k=0.9),
        "top_k must be an int, got 0.9",
    ),
    "generate, top_p": (
        lambda: model().generate(ids(1, 1), 1, top_p=90),
        r"top_p must lie in \(0, 1\], got 90",
    ),
    "generate, length": (
        lambda: model().generate(ids(1, 1), "5"),
        "max_new_tokens must be an integer, got '5'",
    ),
    "generate, seed": (
        lambda: model().generate(ids(1, 1), 1, seed=1.5),
        "seed must be an integer, got 1.5",
    ),
    "tokens, text": (
        lambda: decoding.tokens(model(), "abc", 1),
        "prompts must be lists of at least one token, got 'abc'",
    ),
    "tokens, floats": (
        lambda: decoding.tokens(model(), [[1.5]], 1),
        "each token of prompts must be an integer, got 1.5",
    ),
    "tokens, seeds": (
        lambda: decoding.tokens(model(), [[1], [2]], 1, seed=[1]),
        r"seed must be one, or one for each of 2 prompts, got \[1\]",
    ),
    "complete, one string": (
        lambda: complete(model(), tokenizers.byte(), "abc", 1),
        "prompts must be a list of strings, got 'abc'",
    ),
    "complete, one stop": (
        lambda: complete(model(), tokenizers.byte(), ["a"], 1, stop="ab"),
        "stop must be a list of strings, got 'ab'",
    ),
    "complete, batch": (
        lambda: complete(model(), tokenizers.byte(), ["a"], 1, batch_size=0),
        "batch_size must be at least 1, got 0",
    ),
    "gelu, integers": (
        lambda: kernels.gelu(ids(2)),
        "x must have a floating dtype, got torch.int64",
    ),
    "layer_norm, width": (
        lambda: kernels.layer_norm(X, torch.ones(7), torch.ones(7)),
        r"weight must have the shape of x's last dimension, got \(7,\)",
    ),
    "attention, shape": (
        lambda: kernels.causal_attention(X, X, X),
        r"q must have shape \(B, T, H, D\), got \(2, 3, 8\)",
    ),
    "attention, heads": (
        lambda: kernels.causal_attention_qkv(torch.zeros(1, 2, 24), 5),
        "n_head must divide .*n_head=5",
    ),
    "use, no backend": (
        lambda: kernels.use("gpu").__enter__(),
        "backend must be one of triton, cuda, cpu, reference, got 'gpu'",
    ),
    "quantize, a name": (lambda: int8.quantize_int8("gpt2"), "model must be a Model, got str"),
    "quantize, twice": (lambda: int8.quantize_int8(in_int8()), "it is quantized already"),
    "save, int8": (
        lambda: in_int8().save_pretrained("new"),
        r"model must have floating weights to be saved \(save it before it is quantized",
    ),
    "save, onto a file": (lambda: model().save_pretrained("mine"), "got 'mine'"),
    "save, size of a shard": (
        lambda: model().save_pretrained("new", max_shard_size="many"),
        "max_shard_size must be a number of bytes above 0, .* got 'many'",
    ),
    "load, no model": (lambda: Model.from_pretrained("gtp2"), "got 'gtp2'"),
    "load, another model": (
        lambda: checkpoint.load("run/checkpoint.safetensors", model(n_layer=2)),
        "must hold exactly the state of a run; missing: transformer.h.1.",
    ),
    "convert, to nothing": (lambda: convert.convert("run", "new", "onnx"), "to must be one of"),
    "perplexity, ids": (
        lambda: scoring.perplexity(model(), [1, 999]),
        "text must hold ids from 0 to 255, got 999",
    ),
    "data, no file": (lambda: batches.load("txet", 8), "data must be a file, .* got 'txet'"),
    "data, too short": (
        lambda: batches.load("prompts.txt", 8),
        "data 'prompts.txt' must give more than block_size 8 training tokens",
    ),
    "tokenizer, bytes": (
        lambda: tokenizers.byte().encode(b"ab"),
        "text must be a string, got bytes",
    ),
    "tokenizer, unknown character": (
        lambda: tokenizers.char("ab").encode("abc"),
        r"character 'c' \(U\+0063\) is not among the 2 characters",
    ),
    "tokenizer, unknown id": (
        lambda: tokenizers.byte().decode([256]),
        "token ids must be 0 to 255, got 256",
    ),
    "TrainConfig, text": (lambda: TrainConfig(lr="big"), "lr must be float, got 'big'"),
}


@pytest.mark.parametrize(("act", "line"), PYTHON.values(), ids=PYTHON)
def test_a_mistake_in_python(act, line, untouched):
    with pytest.raises((ValueError, TypeError), match=line) as error:
        act()
    assert "\n" not in str(error.value)


def test_they_are_sixty():
    assert len(COMMANDS) + len(PYTHON) >= 60


def test_integers_of_every_kind_are_fine():
    prompt, seed = np.array([1, 2]), np.int64(3)
    found = [
        [int(t) for t in decoding.tokens(model_, [p], n, seed=s)]
        for model_ in [model()]
        for p, n, s in (([1, 2], 3, 3), (prompt, np.int32(3), seed), ([1, 2], 3, torch.tensor(3)))
    ]
    assert found[0] == found[1] == found[2]
