"""Checks of types and ranges of values that come from users and files."""

import math
from collections.abc import Mapping
from operator import ge, gt, lt
from types import NoneType
from typing import Any

from .errors import InputError, brief


def check_value(
    name: str, value: Any, types: tuple[type, ...], metadata: Mapping[str, Any]
) -> None:
    """Raises InputError, naming the value, unless it has one of the types, is finite, fits 64 bits
    if it is an int, and is in the range that metadata gives: choices, at_least, above, below."""
    allowed = (*types, int) if float in types else types
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join("absent" if t is NoneType else t.__name__ for t in types)
        raise InputError(f"{name} must be {expected}, got {brief(repr(value))}")
    if "choices" in metadata and value not in metadata["choices"]:
        raise InputError(
            f"{name} must be {' or '.join(metadata['choices'])}, got {brief(repr(value))}"
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{name} must be below 2**63, got {brief(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} must be finite, got {value}")
    for words, holds in (("at_least", ge), ("above", gt), ("below", lt)):
        bound = metadata.get(words)
        if value is not None and bound is not None and not holds(value, bound):
            raise InputError(f"{name} must be {words.replace('_', ' ')} {bound}, got {value}")
