"""JSON from outside, with limits on depth and number of values, and without duplicate keys."""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError, brief
from .reading import read_text

_MAX_VALUES = 2**22  # of JSON: a tokenizer.json of 128,000 tokens has a million
_MAX_DEPTH = 100  # of what JSON nests: tokenizer.json and config.json stay below 10


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for other text, for NaN, for duplicate keys, for
    more than 100 levels, and for more than 2^22 values (each takes 60 bytes)."""
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES} values")
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if opened > _MAX_DEPTH and not _is_flat(found):
        raise ValueError("nested too deeply")
    return found


def read_object(what: str, path: Path, most: int) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes. Raises InputError, beginning with `what`,
    for anything else."""
    try:
        found = parse_json(read_text(path, most))
        if not isinstance(found, dict):
            raise ValueError(f"an object is expected, got {type(found).__name__}")
        return found
    except OSError as e:
        raise InputError(f"{what} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{what} must be JSON: {brief(e)}") from e


def _is_flat(found: Any) -> bool:
    """Whether a JSON value has at most 100 levels; each round descends one."""
    level = [found]
    for _ in range(_MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return not level


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {brief(repr(key))} twice")
            seen.add(key)
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
