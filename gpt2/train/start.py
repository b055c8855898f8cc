"""Starts a new training run, or resumes one, and trains to the end (trainer.py)."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files
from ..bars import say
from ..checkpoints import checkpoint
from ..data import tokenizers
from ..errors import InputError
from ..files import lock, streams
from . import best, metrics, pretrained, run_folder
from .config import FIXED, TrainConfig
from .trainer import CONFIG, METRICS, Trainer


@streams.lossy_stderr()
def train(options: TrainConfig) -> int:
    """Trains a new run. Returns the exit code: 0, or 128 plus the number of the signal that
    stopped it.

    Raises InputError, with nothing written, if the options do not fit each other, the data or the
    machine, or if another process trains in the folder.
    """
    _check_alone()
    folder = Path(options.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    files.check_new_folder("out", folder)
    start = None if options.init is None else pretrained.start(options)
    trainer = Trainer(options, start and start.tokenizer)
    if start is not None:
        trainer.start_from(start)
    files.make_folder("out", folder)
    with lock.held("out", folder):
        files.check_new_folder("out", folder)  # again: another process may have been faster
        files.write_atomic(folder / tokenizers.FILE, trainer.corpus.tokenizer.to_json())
        return trainer.run(folder)


@streams.lossy_stderr()
def resume(folder: str | Path, **changes: Any) -> int:
    """Resumes the run in folder, with some options changed. Returns an exit code like train.

    Everything in the folder is validated first. Raises InputError, with nothing written, if the
    folder does not hold a run, its data have changed, an option in FIXED is changed, or another
    process trains in the folder. A run that died before its first checkpoint starts again at
    step 0.
    """
    _check_alone()
    folder = Path(folder)
    for name in FIXED & set(changes):
        raise InputError(f"{name} cannot be changed by --resume, got {changes[name]!r}")
    settings = run_folder.settings(folder / CONFIG)
    options = settings.options
    lock.check_free("resume", folder)
    before = _state_of(folder)
    at_start = before is None and _died_early(folder, options)
    progress = None if at_start else _progress(folder, settings)
    metrics.read(folder / METRICS)
    options = replace(options, **changes)
    if options.keep_best:
        best.check_own(folder)
    tokenizer = tokenizers.load(folder / tokenizers.FILE, options.tokenizer_dir)
    if tokenizer.vocab_size != settings.model.vocab_size:
        raise InputError(
            f"tokenizer {str(folder / tokenizers.FILE)!r} must have the model's "
            f"{settings.model.vocab_size} ids, got {tokenizer.vocab_size}"
        )
    if options.compile and "compile" not in changes:
        say(
            f"{str(folder / CONFIG)!r} asks for torch.compile, which starts a compiler; "
            f"--no-compile trains without it"
        )
    start = _start_again(options) if at_start and options.init is not None else None
    trainer = Trainer(options, tokenizer)
    if progress is not None:
        trainer.load(folder / checkpoint.FILE, progress)
    elif start is not None:
        trainer.start_from(start)
    with lock.held("resume", folder):
        if _state_of(folder) != before:
            raise InputError(
                f"resume must be a folder that no other process trains in, got {str(folder)!r}, "
                f"whose checkpoint has just been replaced"
            )
        files.sweep(folder)
        if at_start:
            say(f"{str(folder)!r} has no checkpoint yet: the run begins again at step 0")
        return trainer.run(folder)


def _progress(folder: Path, settings: run_folder.Settings) -> dict[str, Any]:
    path = folder / checkpoint.FILE
    config, progress = checkpoint.read(path)
    run_folder.check_progress(path, progress, config, settings.model)
    return progress


def _died_early(folder: Path, options: TrainConfig) -> bool:
    """Whether a run without a checkpoint stopped before its first one was due. If so, it can start
    again; otherwise its checkpoint has been lost."""
    done = metrics.last_step(folder / METRICS)
    return done <= min(options.save_interval, options.steps)


def _start_again(options: TrainConfig) -> pretrained.Start:
    try:
        return pretrained.start(options)
    except InputError as e:
        raise InputError(
            f"init {options.init!r} must still exist, because the run has no checkpoint yet: {e}"
        ) from e


def _check_alone() -> None:
    """Raises InputError under torchrun, because each of its processes would train the same run."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise InputError(
            f"WORLD_SIZE must be 1 or absent, training runs in one process (start it without "
            f"torchrun), got {size}"
        )


def _state_of(folder: Path) -> tuple[int, int] | None:
    """A value that changes whenever a checkpoint is written; None if there is no checkpoint."""
    try:
        found = (folder / checkpoint.FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
