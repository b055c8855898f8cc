"""Reads a run's folder, and validates it before a resume computes or writes anything.

The folder may come from somebody else, or have been edited. So every field is checked for its type
and range, and config.json, the tokenizer and the checkpoint must describe the same model.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from .. import files
from ..checks import check_value
from ..config import Config
from ..device import LEAST_PEAK, Peak
from ..errors import InputError, brief, quoted
from . import best
from .config import TrainConfig

_MOST_BYTES = 2**20  # limit for config.json; a real one has 2 kB
_MODEL = ("block_size", "n_layer", "n_head", "n_embd", "dropout")  # in both model and train
_PEAK = {
    "flops": ((float, NoneType), {"at_least": LEAST_PEAK}),
    "source": ((str,), {}),
    "machine": ((str,), {}),
}


@dataclass(frozen=True)
class Settings:
    """A run's config.json."""

    options: TrainConfig
    model: Config


def settings(path: Path) -> Settings:
    """The settings in config.json at path. Raises InputError, naming the file and the field, for
    content that training cannot have written."""
    if not path.is_file():
        raise InputError(f"resume must be the folder of a run, got {quoted(path.parent)}")
    try:
        found = files.read_object(repr(str(path)), path, _MOST_BYTES)
        if found.keys() == {"model"}:
            raise InputError("got converted weights, which --init trains")
        if best.MARK in found:
            raise InputError("got the best weights of a run: resume the run itself, or --init them")
        if unknown := found.keys() - {"model", "train", "peak"}:
            raise InputError(f"unknown field {min(unknown)!r}")
        options = TrainConfig.from_dict(_object(found, "train"))
        model = Config(**_object(found, "model"))
        for name in _MODEL:
            ours, theirs = getattr(model, name), getattr(options, name)
            if ours != theirs:
                raise InputError(f"{name} of model and train must agree, got {ours} and {theirs}")
        if "peak" in found:  # absent in runs of an older version
            _check_peak(_object(found, "peak"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # InputError is a ValueError
        raise InputError(f"{quoted(path)} must hold a run's options: {brief(e)}") from e
    return Settings(options, model)


def check_progress(path: Path, progress: Mapping[str, Any], config: Config, model: Config) -> None:
    """Raises InputError unless a checkpoint's progress is valid and its config is equal to model,
    that of config.json. path is for the message."""
    try:
        check_value("elapsed_s", progress.get("elapsed_s", 0.0), (float,), {"at_least": 0})
        check_value("train_tokens", progress.get("train_tokens"), (int,), {"at_least": 1})
        data = progress.get("data", "")  # absent in runs of an older version
        if "data" in progress and not (
            isinstance(data, str) and re.fullmatch(r"(whole|pages) [0-9a-f]{32}", data)
        ):
            raise InputError(f"data must be a hash, got {brief(repr(data))}")
    except InputError as e:
        raise InputError(f"checkpoint {quoted(path)}: {e}") from e
    for name, theirs in asdict(model).items():
        if (ours := getattr(config, name)) != theirs:
            raise InputError(
                f"checkpoint {quoted(path)} must hold the model of config.json, "
                f"with {name} {theirs}, got {ours}"
            )


def _object(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(found.get(name), dict):
        raise InputError(f"{name} must be an object, got {brief(repr(found.get(name)))}")
    return found[name]


def _check_peak(peak: dict[str, Any]) -> None:
    if peak.keys() != _PEAK.keys():
        raise InputError(f"peak must have {', '.join(_PEAK)}, got {brief(', '.join(peak))}")
    for name, (types, bounds) in _PEAK.items():
        check_value(f"peak's {name}", peak[name], types, bounds)


def kept_peak(path: Path, machine: str) -> Peak | None:
    """The peak that the run's mfu has been computed with, if the machine is the same, else None.

    A new measurement would differ a little, so the same speed would give another mfu.
    """
    try:
        found = Peak(**files.parse_json(files.read_text(path))["peak"])
        usable = found.machine == machine and LEAST_PEAK <= found.flops < math.inf
        return found if usable and isinstance(found.source, str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
