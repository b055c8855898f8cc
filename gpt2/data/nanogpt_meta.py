"""nanoGPT's meta.pkl: the alphabet of a folder of character shards.

    {"vocab_size": 65, "itos": {0: "\\n", 1: " ", …}, "stoi": {"\\n": 0, " ": 1, …}}

The file is a pickle. Only the opcodes that build plain containers, strings and numbers are
accepted (pickles.py), and no class or function is ever looked up.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError, brief, quoted
from ..files import pickles
from .tokenizer import Tokenizer, characters

FILE = "meta.pkl"
_MAX_BYTES = 2**22  # enough for 100,000 characters


def is_one(path: Path) -> bool:
    """Whether a file has the suffix .pkl or begins like a pickle."""
    if path.suffix == ".pkl":
        return True
    with files.open_regular(path) as file:
        return file.read(1) == b"\x80"


def load(path: Path) -> Tokenizer:
    """The character tokenizer in meta.pkl, with the same ids.

    Raises InputError, naming the file, if it is no such pickle, its tables disagree, or a token
    is not a single character.
    """
    what = f"tokenizer {quoted(path)}"
    try:
        data = files.read_bytes(path, _MAX_BYTES)
        pickles.check(data)
        return characters(_alphabet(_Plain(io.BytesIO(data)).load()))
    except OSError as e:
        raise InputError(f"{what} cannot be read: {e.strerror}") from e
    except Exception as e:  # broken pickles raise many kinds of errors
        raise InputError(
            f"{what} must hold an alphabet as nanoGPT's meta.pkl does: "
            f"{brief(e) or type(e).__name__}"
        ) from e


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, key: Any) -> Any:
        raise ValueError("it asks for another object")


def _alphabet(found: Any) -> list[str]:
    """The characters in the order of their ids."""
    if type(found) is not dict or type(found.get("itos")) is not dict:
        got = brief(list(found)) if type(found) is dict else type(found).__name__
        raise ValueError(f"itos, a dictionary of characters, is expected, got {got}")
    itos, size = found["itos"], len(found["itos"])
    if any(type(i) is not int for i in itos) or sorted(itos) != list(range(size)):
        raise ValueError(f"itos must have the ids 0 to {size - 1}, got others")
    alphabet = [itos[i] for i in range(size)]
    if odd := [c for c in alphabet if type(c) is not str or len(c) != 1]:
        raise ValueError(f"itos must hold single characters, got {brief(repr(odd[0]))}")
    if found.get("vocab_size", size) != size:
        raise ValueError(f"vocab_size is {brief(found['vocab_size'])}, itos has {size} characters")
    inverse = {c: i for i, c in enumerate(alphabet)}
    stoi = found.get("stoi", inverse)
    if type(stoi) is not dict or stoi != inverse:
        raise ValueError("stoi must be the inverse of itos")
    return alphabet
