"""A checkpoint is one safetensors file: weights, optimizer state, and metadata for a resume.

    transformer.h.0.ln_1.weight …           the weights by name; the tied head is not repeated
    optimizer.exp_avg.<name of a weight> …  AdamW's state for that weight
    __metadata__                            JSON: the model's configuration, the step, …

The file is replaced atomically, so weights and optimizer state always match. It contains no code.
Its header is validated before anything is allocated or changed.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .. import files
from ..checks import check_value
from ..config import Config
from ..errors import InputError, brief, quoted
from . import weights
from .weights import HEAD, WTE, plain

FILE = "checkpoint.safetensors"  # in the folder of a run
_OPTIMIZER = "optimizer."
_MAX_METADATA = 2**20  # characters of JSON; a real one has 300
_FLOATS = ("F16", "BF16", "F32", "F64")


def save(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, **progress: Any
) -> None:
    """Writes a checkpoint to path atomically: on failure the old file stays. progress (step, …)
    must be JSON values."""
    tensors = {}
    for name, parameter in model.named_parameters():
        name = plain(name)
        tensors[name] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{key}.{name}"] = value
    write(path, model.config, tensors, **progress)


def write(
    path: str | Path, config: Config, tensors: dict[str, torch.Tensor], **progress: Any
) -> None:
    """Writes a checkpoint of tensors by name to path, atomically."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"gpt2": json.dumps({"config": asdict(config), **progress})}
    files.write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def read(path: str | Path) -> tuple[Config, dict[str, Any]]:
    """The model's configuration and the progress that save was given, from the header alone.

    Raises InputError, naming the file, unless it holds every weight of that configuration. So a
    model built from the configuration is no larger than the file.
    """
    with _open(path) as file:
        try:
            described = (file.metadata() or {})["gpt2"]
            if len(described) > _MAX_METADATA:
                raise InputError(f"at most {_MAX_METADATA} characters, got {len(described)}")
            progress = files.parse_json(described)
            config = Config(**progress.pop("config"))
            check_value("step", progress["step"], (int,), {"at_least": 0})
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError(
                f"checkpoint {quoted(path)} must have metadata ({type(e).__name__}: {brief(e)})"
            ) from e
        tensors, size = len(file.keys()), Path(path).stat().st_size
        what = f"checkpoint {quoted(path)}"
        weights.check_layers(what, config.n_layer, tensors=tensors, size=size)
        _keys(path, file, weights.shapes(config))
    return config, progress


def load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Loads path into model, and into optimizer if given.

    Raises InputError, naming the file and the fault, if the file is broken or its names or shapes
    are not exactly those of the model. Nothing is changed then.
    """
    parameters = {plain(name): p for name, p in model.named_parameters()}
    with _open(path) as file:
        keys = _keys(path, file, {name: p.shape for name, p in parameters.items()})
        state = _optimizer_state(path, file, model, optimizer) if optimizer else None
        with torch.no_grad():
            for name, key in keys.items():
                parameters[name].copy_(file.get_tensor(key))
    if optimizer:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def state(path: str | Path, config: Config) -> dict[str, torch.Tensor]:
    """The weights in path by their plain names, in their stored dtype; the tied head is not
    repeated."""
    with _open(path) as file:
        keys = _keys(path, file, weights.shapes(config))
        return {name: file.get_tensor(key) for name, key in keys.items()}


@contextmanager
def _open(path: str | Path) -> Iterator[safe_open]:
    try:
        files.check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or brief(e)
        raise InputError(f"checkpoint {quoted(path)} cannot be read: {reason}") from e


def _keys(path: str | Path, file: safe_open, shapes: weights.Shapes) -> dict[str, str]:
    """The key in the file for each weight. A tied weight may be stored under both of its names;
    the embedding's is used then."""
    keys: dict[str, str] = {}
    found: dict[str, str] = {}  # name -> key
    for key in sorted(file.keys()):  # lm_head before transformer.wte
        if key.startswith(_OPTIMIZER):
            continue
        name = plain(key)
        if name in found:
            raise InputError(
                f"checkpoint {quoted(path)} must hold {brief(name)} once, "
                f"got {brief(found[name])} and {brief(key)}"
            )
        found[name] = key
        keys[key] = WTE if name == HEAD else name
    names = set(keys.values())
    missing = [name for name in shapes if name not in names]
    unexpected = [key for key, name in keys.items() if name not in shapes]
    if missing or unexpected:
        raise InputError(
            f"checkpoint {quoted(path)} must hold exactly the state of a run; "
            f"missing: {weights.some(missing)}; unexpected: {weights.some(unexpected)}"
        )
    for key, name in keys.items():
        _check_tensor(path, file, key, shapes[name])
    return {name: key for key, name in keys.items()}


def _optimizer_state(
    path: str | Path, file: safe_open, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, torch.Tensor]]:
    """AdamW's state by parameter position; empty if the file was saved before step 1."""
    names = {id(p): plain(name) for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    shapes = {plain(name): p.shape for name, p in model.named_parameters()}
    keys = {plain(key): key for key in list(file.keys()) if key.startswith(_OPTIMIZER)}
    if not keys:
        return {}
    state = {}
    for i, name in enumerate(order):
        state[i] = {}
        for part, shape in (("step", ()), ("exp_avg", shapes[name]), ("exp_avg_sq", shapes[name])):
            key = keys.pop(f"{_OPTIMIZER}{part}.{name}", None)
            if key is None:
                raise InputError(f"checkpoint {quoted(path)} must hold {part} of {name}, got none")
            _check_tensor(path, file, key, shape)
            state[i][part] = file.get_tensor(key)
        _check_range(path, name, state[i]["step"], state[i]["exp_avg_sq"])
    if keys:
        raise InputError(f"checkpoint {quoted(path)} holds unknown {weights.some(list(keys))}")
    return state


def _check_range(path: str | Path, name: str, step: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
    """Raises InputError if step or exp_avg_sq is negative or NaN. AdamW takes the square root of
    exp_avg_sq."""
    for part, holds in (("step", step >= 0), ("exp_avg_sq", exp_avg_sq >= 0)):  # NaN fails, too
        if not holds.all():
            raise InputError(f"checkpoint {quoted(path)} must hold {part} >= 0 for {name}")


def _check_tensor(path: str | Path, file: safe_open, key: str, shape: Sequence[int]) -> None:
    stored = file.get_slice(key)
    if tuple(stored.get_shape()) != tuple(shape) or stored.get_dtype() not in _FLOATS:
        raise InputError(
            f"checkpoint {quoted(path)} must hold {brief(key)} as floats of shape {tuple(shape)}, "
            f"got {stored.get_dtype()} of shape {brief(tuple(stored.get_shape()))}"
        )
