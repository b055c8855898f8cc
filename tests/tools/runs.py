"""Training runs that take seconds, and their output."""

import json
import os
from pathlib import Path

import pytest

from gpt2.train.config import TrainConfig
from gpt2.train.start import train
from gpt2.train.trainer import Trainer

TEXT = "the cat sat on the mat, and the dog sat on the cat. " * 60
TINY = {
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "batch_size": 4,
    "steps": 12,
    "warmup_steps": 2,
    "eval_interval": 5,
    "eval_batches": 3,
    "log_interval": 2,
    "save_interval": 5,
    "sample_tokens": 5,
    "device": "cpu",
}
FULL = Path("/dev/full")


def train_once(folder):
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(options("text.txt", out="run", sample_tokens=0))
    return folder


def options(text, **changes) -> TrainConfig:
    return TrainConfig(**{**TINY, "data": text, **changes})


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupted_after(step):
    """A train_step that is interrupted by Ctrl-C in the middle of that step."""
    original = Trainer.train_step

    def train_step(trainer):
        if trainer.step == step - 1:
            os.kill(os.getpid(), 2)
        return original(trainer)

    return train_step


def flags(**chosen) -> list[str]:
    values = vars(options("text.txt", **{"sample_tokens": 0, "steps": 6, **chosen}))
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def told(capsys) -> str:
    """The printed error, which must be one line."""
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "Traceback" not in err
    return line
