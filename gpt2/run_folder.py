"""What the folder of a run says of it, validated before a resume computes or writes anything.

Somebody else may have made or edited the folder: every field has a type and a range, and
config.json, the tokenizer and the checkpoint must describe one model.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from . import best, files
from .config import Config
from .errors import InputError, brief, quoted
from .machine import LEAST_PEAK
from .train_config import TrainConfig, check

_MOST_BYTES = 2**20  # of config.json, which has 2 kB
_MODEL = ("block_size", "n_layer", "n_head", "n_embd", "dropout")  # fields of model and of train
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
    """What config.json at path holds. Raises InputError, naming the file and the field, for what
    training would not have written there."""
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
                raise InputError(f"{name} must be one number, got {ours} and {theirs}")
        if "peak" in found:  # absent: of an older version
            _check_peak(_object(found, "peak"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # InputError is a ValueError
        raise InputError(f"{quoted(path)} must hold a run's options: {brief(e)}") from e
    return Settings(options, model)


def check_progress(path: Path, progress: Mapping[str, Any], config: Config, model: Config) -> None:
    """Raises InputError unless the checkpoint at path says how far a run came, and its config is
    the model of config.json."""
    try:
        check("elapsed_s", progress.get("elapsed_s", 0.0), (float,), {"at_least": 0})
        check("train_tokens", progress.get("train_tokens"), (int,), {"at_least": 1})
        data = progress.get("data", "")  # absent: of an older version
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
        check(f"peak's {name}", peak[name], types, bounds)
