"""RUN/best: the checkpoint of a run with the lowest validation loss so far, for `--keep-best`.

It has the form of a run's folder, so that everything that reads a model takes it, but neither
optimizer state nor options: training does not go on from it. The loss and what it was measured on
stand in the header of the file that holds the weights, so that they never disagree.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, files
from . import tokenizer as tokenizers
from .errors import InputError, quoted
from .tokenizer import Tokenizer

FOLDER = "best"  # in the folder of a run
MARK = "best_of"  # in its config.json: what is no run to go on with


def read(run: Path) -> dict[str, Any] | None:
    """step, val_loss and measure of the best checkpoint of a run; None where there is none.

    Raises InputError, naming the file, where it is broken.
    """
    path = run / FOLDER / checkpoint.FILE
    if not os.path.lexists(path):
        return None
    _, found = checkpoint.read(path)
    loss = found.get("val_loss")
    if not (isinstance(loss, float) and 0 <= loss < math.inf):
        found["measure"] = None  # of no use: it is measured anew
    return found


def check_own(run: Path) -> None:
    """Raises InputError where the best checkpoint of a run would be written into another folder, or
    where it cannot be one."""
    path = run / FOLDER
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "no folder"
        raise InputError(
            f"keep_best needs {quoted(path)} as a folder or absent, got {kind}; remove it"
        )


def write(
    run: Path, model: nn.Module, tokenizer: Tokenizer, *, step: int, val_loss: float, measure: Any
) -> None:
    """Replaces the best checkpoint of a run in one step, and makes the folder whole at first.
    Raises InputError as check_own does."""
    check_own(run)
    tensors = {checkpoint.plain(name): p.detach() for name, p in model.named_parameters()}

    def fill(folder: Path) -> None:
        settings = {"model": asdict(model.config), MARK: run.name}
        files.write_atomic(folder / tokenizers.FILE, tokenizer.to_json())
        files.write_atomic(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        checkpoint.write(
            folder / checkpoint.FILE,
            model.config,
            tensors,
            step=step,
            val_loss=val_loss,
            measure=measure,
        )

    if (run / FOLDER).exists():
        files.sweep(run / FOLDER)
        fill(run / FOLDER)
        return
    with files.work_folder(run / FOLDER) as work:
        whole = work / FOLDER
        whole.mkdir()
        fill(whole)
        os.replace(whole, run / FOLDER)
