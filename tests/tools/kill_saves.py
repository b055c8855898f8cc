"""Kills a process while it writes checkpoints, many times. Each kill must leave a complete
checkpoint, not older than the last save that had returned.

    python tests/tools/kill_saves.py [KILLS]     # 2000: four minutes on two cores
"""

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2 import files
from gpt2.checkpoints import checkpoint
from gpt2.config import Config
from gpt2.errors import InputError
from gpt2.model import Model
from gpt2.train import optim

CONFIG = Config(block_size=8, vocab_size=4096, n_layer=2, n_head=2, n_embd=64)


@dataclass
class Outcome:
    """The outcomes of the kills, as numbers of kills."""

    kills: int = 0
    inside: int = 0  # during a save: its temporary folder existed
    unreadable: int = 0
    mixed: int = 0  # weights of two saves in one file
    back: int = 0  # older than a save that had returned
    strays: int = 0  # files left after the cleanup

    @property
    def flawless(self) -> bool:
        return not (self.unreadable or self.mixed or self.back or self.strays)


def kill_saves(folder: Path, kills: int) -> Outcome:
    """Kills this many children, one after the other, at different moments of saving to one file."""
    path, outcome = folder / "checkpoint.safetensors", Outcome()
    model = Model(CONFIG)
    optimizer = optim.adamw(model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    x = torch.zeros(2, 8, dtype=torch.int64)
    model(x, x)[1].backward()
    optimizer.step()
    other = Model(CONFIG)
    for kill in range(kills):
        returned = _killed(path, model, optimizer, 0.0007 * (kill % 40))
        outcome.kills += 1
        try:
            step = checkpoint.read(path)[1]["step"]
            checkpoint.load(path, other)
        except InputError as error:
            outcome.unreadable += 1
            print(f"kill {kill}: {error}", file=sys.stderr)
            continue
        outcome.back += step < returned
        outcome.mixed += not all((p == step).all() for p in other.parameters())
        outcome.inside += len(list(folder.iterdir())) > 1
        files.sweep(folder)
        outcome.strays += [p.name for p in folder.iterdir()] != [path.name]
    return outcome


def _killed(path: Path, model, optimizer, seconds: float) -> int:
    """Starts a child that saves until it is killed, `seconds` after its first save. Returns the
    number of saves that had returned. A fork starts seconds faster than a new program."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _save_forever(path, model, optimizer, write)
    os.close(write)
    returned = len(os.read(read, 1))  # waits for the first save, so that there is a file
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while saves := os.read(read, 4096):
        returned += len(saves)
    os.close(read)
    return returned


def _save_forever(path: Path, model, optimizer, pipe: int) -> None:
    """In the child: saves weights that are all n in step n, then writes a byte to the pipe."""
    try:
        torch.set_num_threads(1)  # OpenMP would wait for threads that fork does not copy
        step = 0
        while True:
            step += 1
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.tensor(float(step)))
            checkpoint.save(path, model, optimizer, step=step)
            os.write(pipe, b".")
    finally:
        os._exit(1)


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_saves(Path(folder), kills)
    print(outcome)
    return 0 if outcome.flawless else 1


if __name__ == "__main__":
    sys.exit(main())
