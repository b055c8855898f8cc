"""--resume in a folder that somebody else made or edited: every field is validated before work
starts, and nothing is written if one is invalid."""

import json
import os
import shutil

import pytest
import torch
from checkpoint_files import rewritten
from runs import rows, train_once

from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.train.start import resume
from gpt2.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

HUGE = 10**30


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return train_once(tmp_path_factory.mktemp("one-run"))


@pytest.fixture
def run(one_run, tmp_path, monkeypatch):
    """A copy of a finished run, to edit."""
    shutil.copytree(one_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def refused(run, capsys, monkeypatch) -> str:
    """Returns the one-line error of a resume; no model was built and no file written."""

    def no_work(*args):
        raise AssertionError("work has started")

    monkeypatch.setattr(Trainer, "__init__", no_work)
    before = contents(run)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--steps", "20"]) == 2
    assert contents(run) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt2: error: ") and len(line) < 500
    return line


def edited(path, change):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


NUMBERS = ("text", None, True, [], {}, float("1e400"), -HUGE)
CONFIG = {
    **{
        f"train-{name}-{value!r:.8}": (lambda s, n=name, v=value: s["train"].update({n: v}), name)
        for name in ("steps", "batch_size", "lr", "seed", "save_interval", "val_fraction")
        for value in NUMBERS
        if not (isinstance(value, float) and name != "lr")
    },
    "steps-huge": (lambda s: s["train"].update(steps=HUGE), "steps must be below 2**63"),
    "lr-huge": (lambda s: s["train"].update(lr=10**400), "lr must be below 2**63"),
    "device": (lambda s: s["train"].update(device=3), "device must be str"),
    "dtype": (lambda s: s["train"].update(dtype="int8"), "dtype must be auto"),
    "compile": (lambda s: s["train"].update(compile="yes"), "compile must be bool"),
    "unknown": (lambda s: s["train"].update(x=1), "unknown option 'x'"),
    "train-list": (lambda s: s.update(train=[]), "train must be an object"),
    "no-train": (lambda s: s.pop("train"), "train must be an object"),
    "no-model": (lambda s: s.pop("model"), "model must be an object"),
    "model-list": (lambda s: s.update(model=[1]), "model must be an object"),
    "model-type": (lambda s: s["model"].update(n_embd="16"), "n_embd must be an int"),
    "model-range": (lambda s: s["model"].update(n_layer=0), "n_layer must be at least 1"),
    "model-unknown": (lambda s: s["model"].update(x=1), "unexpected keyword argument 'x'"),
    "model-train": (lambda s: s["model"].update(n_layer=3), "n_layer of model and train must"),
    "train-model": (lambda s: s["train"].update(block_size=8), "block_size of model and train"),
    "dropout": (lambda s: s["model"].update(dropout=0.5), "dropout of model and train"),
    "vocabulary": (
        lambda s: s["model"].update(vocab_size=99),
        "checkpoint 'run/checkpoint.safetensors' must hold the model of config.json, with "
        "vocab_size 99",
    ),
    "both": (
        lambda s: (s["model"].update(n_layer=1), s["train"].update(n_layer=1)),
        "must hold the model of config.json, with n_layer 1, got 2",
    ),
    "peak-list": (lambda s: s.update(peak=[]), "peak must be an object"),
    "peak-flops": (lambda s: s["peak"].update(flops=-1.0), "peak's flops must be at least 1.0"),
    "peak-zero": (lambda s: s["peak"].update(flops=0), "peak's flops must be at least 1.0"),
    "peak-tiny": (lambda s: s["peak"].update(flops=5e-324), "flops must be at least 1.0, got 5e-3"),
    "peak-text": (lambda s: s["peak"].update(flops="1e9"), "peak's flops must be float or absent"),
    "peak-source": (lambda s: s["peak"].update(source=1), "peak's source must be str"),
    "peak-field": (lambda s: s["peak"].pop("machine"), "peak must have flops, source, machine"),
    "field": (lambda s: s.update(extra=1), "unknown field 'extra'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), CONFIG.values(), ids=CONFIG)
def test_a_field_of_config_json(change, told, run, capsys, monkeypatch):
    edited(run / "config.json", change)
    line = refused(run, capsys, monkeypatch)
    assert told in line or ("Infinity is not JSON" in line and told == "lr"), line


def nested(path):
    path.write_text('{"train":' * 3000)


def large(path):
    path.write_text(" " * 2**21)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
@pytest.mark.parametrize("spoil", [nested, large, fifo], ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_none(spoil, name, run, capsys, monkeypatch):
    spoil(run / name)
    if name == "metrics.jsonl" and spoil is nested:
        (run / name).write_text((run / name).read_text() + "\n")
    line = refused(run, capsys, monkeypatch)
    assert name in line or "'run'" in line


LINES = {
    "step-text": ({"step": "2"}, "step must be int"),
    "step-float": ({"step": 2.5}, "step must be int"),
    "step-bool": ({"step": True}, "step must be int"),
    "step-huge": ({"step": HUGE}, "step must be below 2**63"),
    "step-negative": ({"step": -1}, "step must be at least 1"),
    "step-back": ({"step": 1}, "step must be above 2, that of the line before, got 1"),
    "loss-text": ({"train_loss": "x"}, "train_loss must be float"),
    "loss-null": ({"train_loss": None}, "train_loss must be float"),
    "loss-huge": ({"train_loss": 10**400}, "train_loss must be below 2**63"),
    "val-list": ({"val_loss": [1]}, "val_loss must be float"),
    "lr": ({"lr": -1}, "lr must be at least 0"),
    "speed": ({"tokens_per_s": "fast"}, "tokens_per_s must be float or absent"),
    "mfu": ({"mfu": -0.5}, "mfu must be at least 0"),
    "elapsed": ({"elapsed_s": "1"}, "elapsed_s must be float"),
    "unknown": ({"x": 1}, "unknown field 'x'"),
}


@pytest.mark.parametrize(("change", "told"), LINES.values(), ids=LINES)
def test_a_field_of_metrics_jsonl(change, told, run, capsys, monkeypatch):
    """The lines after a broken one were lost without an error."""
    lines = rows(run)
    lines[1].update(change)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = refused(run, capsys, monkeypatch)
    assert f"'run/metrics.jsonl', line 2: {told}" in line


@pytest.mark.parametrize("line", ["[1]", "{", "NaN", '{"step": 3}', '{"step": 3, "step": 4}', ""])
def test_a_line_that_training_did_not_write(line, run, capsys, monkeypatch):
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([text[0], line + "\n", *text[1:]]))
    assert "'run/metrics.jsonl', line 2: " in refused(run, capsys, monkeypatch)


@pytest.mark.parametrize("tail", [b'{"step": 1', b"\0\0\0", b"\xff"], ids=str)
def test_a_last_line_that_a_kill_cut_short(tail, run):
    before = rows(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert resume("run", steps=13) == 0
    assert rows(run)[: len(before)] == before and len(rows(run)) == len(before) + 1


PROGRESS = {
    "step-bool": ({"step": True}, "step must be int"),
    "step-huge": ({"step": HUGE}, "step must be below 2**63"),
    "elapsed-text": ({"elapsed_s": "x"}, "elapsed_s must be float"),
    "elapsed-negative": ({"elapsed_s": -1.0}, "elapsed_s must be at least 0"),
    "elapsed-huge": ({"elapsed_s": 10**400}, "elapsed_s must be below 2**63"),
    "tokens-text": ({"train_tokens": "x"}, "train_tokens must be int"),
    "tokens-null": ({"train_tokens": None}, "train_tokens must be int"),
    "tokens-zero": ({"train_tokens": 0}, "train_tokens must be at least 1"),
    "data-number": ({"data": 3}, "data must be a hash, got 3"),
    "data-text": ({"data": "whole x"}, "data must be a hash, got 'whole x'"),
}


@pytest.mark.parametrize(("change", "told"), PROGRESS.values(), ids=PROGRESS)
def test_a_field_of_the_checkpoints_progress(change, told, run, capsys, monkeypatch):
    rewritten(run / checkpoint.FILE, lambda tensors, description: description.update(change))
    line = refused(run, capsys, monkeypatch)
    assert "checkpoint 'run/checkpoint.safetensors'" in line and told in line


@pytest.mark.parametrize("part", ["step", "exp_avg_sq"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_state_that_no_optimizer_has(part, value, run, capsys):
    """AdamW takes the square root of exp_avg_sq; a negative step makes its factors negative."""
    name = f"optimizer.{part}.transformer.wte.weight"
    rewritten(run / checkpoint.FILE, lambda t, d: t.update({name: torch.full_like(t[name], value)}))
    before = contents(run)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--steps", "20"]) == 2
    assert f"must hold {part} >= 0 for transformer.wte.weight" in capsys.readouterr().err
    assert contents(run) == before


def test_a_tokenizer_of_another_model(run, capsys, monkeypatch):
    (run / "tokenizer.json").write_text('{"name": "byte"}')
    ids = json.loads((run / "config.json").read_text())["model"]["vocab_size"]
    line = refused(run, capsys, monkeypatch)
    assert f"'run/tokenizer.json' must have the model's {ids} ids, got 25" in line


@pytest.mark.parametrize("flags", [[], ["--compile"], ["--no-compile"]], ids=str)
def test_a_folder_starts_no_compiler_without_a_word(flags, run, capsys, monkeypatch):
    """config.json may be somebody else's; a flag is from the user."""
    edited(run / "config.json", lambda settings: settings["train"].update(compile=True))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(1) or model)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--steps", "13", *flags]) == 0
    told = (
        "'run/config.json' asks for torch.compile, which starts a compiler; "
        "--no-compile trains without it\n"
    )
    assert (told in capsys.readouterr().err) == (flags == [])
    assert bool(compiled) == (flags != ["--no-compile"])
