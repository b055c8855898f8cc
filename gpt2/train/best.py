"""RUN/best: the checkpoint of a run with the lowest validation loss so far, for `--keep-best`.

It is laid out like a run's folder, so everything that reads a model can read it. It has neither
optimizer state nor training options, so it cannot be resumed. The loss and a record of the batches
it was measured on are in the header of the weights' file, so they always match the weights.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .. import files
from ..checkpoints import checkpoint
from ..data import tokenizers
from ..data.tokenizer import Tokenizer
from ..errors import InputError, quoted

FOLDER = "best"  # in the folder of a run
MARK = "best_of"  # in its config.json: tells --resume that this is not a run


def read(run: Path) -> dict[str, Any] | None:
    """step, val_loss and measure of a run's best checkpoint; None if there is none.

    Raises InputError, naming the file, if it is broken.
    """
    path = run / FOLDER / checkpoint.FILE
    if not os.path.lexists(path):
        return None
    _, found = checkpoint.read(path)
    loss = found.get("val_loss")
    if not (isinstance(loss, float) and 0 <= loss < math.inf):
        found["measure"] = None  # makes the trainer measure the loss again
    return found


def check_own(run: Path) -> None:
    """Raises InputError if RUN/best is a link, which would lead out of the run, or not a folder."""
    path = run / FOLDER
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "a file"
        raise InputError(
            f"keep_best needs {quoted(path)} to be a folder or absent, got {kind}; remove it"
        )


def write(
    run: Path, model: nn.Module, tokenizer: Tokenizer, *, step: int, val_loss: float, measure: Any
) -> None:
    """Replaces a run's best checkpoint atomically. The first call creates the folder, which appears
    only when it is complete. Raises InputError for the same reasons as check_own."""
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
