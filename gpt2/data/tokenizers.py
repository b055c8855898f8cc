"""Tokenizers by name, and from files of every supported format.

tokenizer.json of a run       Tokenizer.to_json
tokenizer.json, vocab.json    Hugging Face's: hf_tokenizer.py
one line of base64 per token  tiktoken's: tiktoken_file.py
meta.pkl                      nanoGPT's: nanogpt_meta.py
"""

import base64
import os
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError, brief, quoted
from . import hf_tokenizer, nanogpt_meta, tiktoken_file
from .bytelevel import EOT, GPT2_SIZE
from .tokenizer import FILE, Tokenizer, bpe, byte, char, characters, cut, first, gpt2, train_bpe

__all__ = [
    "EOT", "FILE", "GPT2_SIZE", "Tokenizer", "bpe", "byte", "char", "characters", "cut", "first",
    "from_json", "gpt2", "load", "named", "save", "train_bpe",
]  # fmt: skip


def from_json(text: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that to_json wrote. Raises InputError for anything else."""
    try:
        found = files.parse_json(text)
    except ValueError as e:
        raise InputError(f"a tokenizer is expected, got {brief(e)}") from e
    return _from_content(found, folder)


def _from_content(found: Any, folder: str | Path | None) -> Tokenizer:
    """The tokenizer that parsed JSON describes. Raises InputError if it describes none."""
    try:
        return _from_state(found, folder)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"a tokenizer is expected, got {brief(e) or type(e).__name__}") from e


def _from_state(state: Any, folder: str | Path | None) -> Tokenizer:
    if "size" in state:
        size = state["size"]
        whole = _from_state({key: state[key] for key in state if key != "size"}, folder)
        if type(size) is not int or not 1 <= size <= whole.vocab_size:
            raise InputError(f"size must be 1 to {whole.vocab_size}, got {brief(repr(size))}")
        return first(whole, size)
    match state["name"]:
        case "char":
            if not isinstance(state["alphabet"], str):
                raise InputError(f"alphabet must be a text, got {brief(repr(state['alphabet']))}")
            return characters(state["alphabet"])
        case "byte":
            return byte()
        case "gpt2":
            return gpt2(folder)
        case "bpe":
            return bpe([base64.b64decode(t, validate=True) for t in state["ranks"]])
        case "hf":
            return hf_tokenizer.from_state(state["tokenizer"])
    name = brief(repr(state["name"]))
    raise InputError(f"name must be char, byte, gpt2, bpe or hf, got {name}")


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes a BPE: as JSON if the name ends in .json, otherwise in tiktoken's text format."""
    as_json = Path(path).suffix == ".json"
    text = tokenizer.to_json() if as_json else tiktoken_file.to_text(tokenizer)
    files.write_atomic(path, text)


def named(spec: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that spec names: byte, gpt2 (folder may hold its files), a file or a folder.

    Raises InputError for any other name. (`char` needs a text: see documents.tokenizer_for.)
    """
    if spec == "byte":
        return byte()
    if spec == "gpt2":
        return gpt2(folder)
    if spec != "char" and os.path.lexists(spec):
        return load(spec, folder)
    raise InputError(
        f"tokenizer must be byte, gpt2, a file, or (for text) char, got {quoted(spec)}"
    )


def load(path: str | Path, folder: str | Path | None = None) -> Tokenizer:
    """A tokenizer from a file: the JSON of a run folder, tiktoken's ranks, nanoGPT's meta.pkl, or
    Hugging Face's tokenizer.json or vocab.json. A folder that holds one of these also works.

    Raises InputError, naming the file, if it cannot be read.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):
            return _of_folder(path, folder)
        if nanogpt_meta.is_one(path):
            return nanogpt_meta.load(path)
        text = files.read_text(path)
        if not text.startswith("{"):
            return tiktoken_file.from_text(text)
        found = files.parse_json(text)
        if hf_tokenizer.is_one(path, found):
            return hf_tokenizer.load(path, found)
        return _from_content(found, folder)
    except OSError as e:
        raise InputError(f"tokenizer {quoted(path)} cannot be read: {e.strerror}") from e
    except ValueError as e:  # InputError and UnicodeDecodeError are ValueErrors
        message = str(e)
        prefix = "" if message.startswith("tokenizer ") else f"tokenizer {quoted(path)}: "
        raise InputError(prefix + message) from e


def _of_folder(path: Path, folder: str | Path | None) -> Tokenizer:
    names = (FILE, hf_tokenizer.VOCAB, nanogpt_meta.FILE)
    found = [name for name in names if os.path.lexists(path / name)]
    if not found:
        raise InputError(f"a folder must hold {', '.join(names[:-1])} or {names[-1]}, got none")
    path = path / found[0]
    try:
        files.check_regular(path)  # a folder here would recurse without end
    except OSError as e:
        raise InputError(f"tokenizer {quoted(path)} cannot be read: {e.strerror}") from e
    return load(path, folder)
