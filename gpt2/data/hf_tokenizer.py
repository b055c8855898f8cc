"""Reads and writes Hugging Face's GPT-2 tokenizers: tokenizer.json, or vocab.json and merges.txt.

Any byte-level BPE with GPT-2's pattern can be read. It encodes with Hugging Face's own library.
Settings that would change the ids of a text are refused by name: a normalizer, a prefix space,
another pattern, added words that are not special. Special tokens have ids, but encoding a text
never produces them. AutoTokenizer loads the written files and gives the same ids.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import InputError, brief, quoted
from . import bytelevel
from .bytelevel import EOT
from .tokenizer import FILE, Tokenizer, characters

VOCAB, MERGES, ADDED, CONFIG = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
FILES = (FILE, CONFIG, VOCAB, MERGES, ADDED, "special_tokens_map.json")
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_FIXED = {  # keys of the BPE -> the values that do not change the ids
    "type": ("BPE",),
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
_SETTINGS = ("add_prefix_space", "add_bos_token", "add_eos_token")  # in tokenizer_config.json


def is_one(path: Path, found: Any) -> bool:
    """Whether the content of a JSON file is a Hugging Face tokenizer."""
    if not isinstance(found, dict) or isinstance(found.get("name"), str):  # ours has a name
        return False
    return isinstance(found.get("model"), dict) or path.name == VOCAB


def is_in(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer file, readable or not."""
    return any(os.path.lexists(folder / name) for name in (FILE, VOCAB))


def load(path: Path, found: dict[str, Any]) -> Tokenizer:
    """The tokenizer in tokenizer.json or vocab.json with the settings files beside it. found is
    the content of path.

    Raises InputError, naming file and key, for a setting that would change the ids of a text.
    """
    config = _read(path.with_name(CONFIG)) if os.path.lexists(path.with_name(CONFIG)) else {}
    for key in _SETTINGS:
        if config.get(key) not in (None, False):
            raise InputError(
                f"tokenizer {quoted(path.with_name(CONFIG))}: {key} must be false, "
                f"got {brief(repr(config[key]))}"
            )
    try:
        return _make(found if path.name != VOCAB else _of_vocab(path, found), config)
    except InputError as e:
        raise InputError(f"tokenizer {quoted(path)}: {e}") from e


def from_state(state: Any) -> Tokenizer:
    """The tokenizer that the content of a tokenizer.json describes."""
    return _make(state, {})


def _make(state: Any, config: dict[str, Any]) -> Tokenizer:
    if alphabet := _characters_of(state):
        return characters(alphabet)
    model, added = _checked(state)
    vocab = model["vocab"]
    for token in _listed(config):
        if added.setdefault(token["content"], token)["id"] != token["id"]:
            raise InputError(f"added_tokens_decoder: {brief(token)} has another id in {FILE}")
    ids = dict(vocab)
    for content, token in added.items():
        if not token.get("special", False) and content != EOT:
            raise InputError(
                f"added_tokens must be special, because others are matched in texts, "
                f"got {brief(repr(content))}"
            )
        if ids.setdefault(content, token["id"]) != token["id"]:
            raise InputError(f"added_tokens: {brief(repr(content))} has two ids")
    if sorted(ids.values()) != list(range(len(ids))):
        raise InputError(f"vocab must have the ids 0 to {len(ids) - 1}, each once, got others")
    tokens = [b""] * len(ids)
    for token, i in ids.items():
        try:
            tokens[i] = token.encode() if token in added else bytelevel.to_bytes(token)
        except (KeyError, UnicodeEncodeError):
            raise InputError(
                f"vocab must hold bytes as characters, got {brief(repr(token))}"
            ) from None
    if missing := [c for c in bytelevel.BYTE_OF_CHAR if c not in vocab]:
        raise InputError(f"vocab must hold every single byte, got none for {missing[0]!r}")
    ends = config.get("eos_token")
    ends = ends.get("content") if isinstance(ends, dict) else ends
    eot = ids.get(EOT, ids[ends] if isinstance(ends, str) and ends in added else None)
    return Tokenizer("hf", tokens, _encoder(model), eot, state=_state(model, added))


def _characters_of(state: Any) -> list[str] | None:
    """The alphabet of a tokenizer.json that _of_characters wrote; None for any other."""
    model = state.get("model") if isinstance(state, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or list(vocab.values()) != list(range(len(vocab))):
        return None
    alphabet = list(vocab)
    return alphabet if state == _of_characters(alphabet) else None


def _checked(state: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The model section and the added tokens by their content. Raises InputError if a section is
    not that of a plain byte-level BPE."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError("model must be a BPE with vocab and merges, got none")
    if state.get("normalizer") is not None:
        raise InputError(f"normalizer must be null, got {brief(state['normalizer'])}")
    before, after = state.get("pre_tokenizer"), state.get("post_processor")
    if not isinstance(before, dict) or before.get("type") != "ByteLevel":
        raise InputError(f"pre_tokenizer must be ByteLevel, got {brief(before)}")
    for key, expected in (("add_prefix_space", False), ("use_regex", True)):
        if before.get(key, True) is not expected:
            raise InputError(
                f"pre_tokenizer: {key} must be {str(expected).lower()}, "
                f"got {brief(before.get(key, True))}"
            )
    after = None if _adds_nothing(after) else after
    for key, found in (("post_processor", after), ("decoder", state.get("decoder"))):
        if found is not None and (not isinstance(found, dict) or found.get("type") != "ByteLevel"):
            raise InputError(f"{key} must be null or ByteLevel, got {brief(found)}")
    model = state["model"]
    for key, allowed in _FIXED.items():
        if model.get(key, allowed[0]) not in allowed:
            raise InputError(f"model: {key} must be {allowed[0]!r}, got {brief(repr(model[key]))}")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or any(type(i) is not int for i in vocab.values()):
        raise InputError("model: vocab must be an object from tokens to ids")
    if not isinstance(merges, list):
        raise InputError("model: merges must be a list")
    added = state.get("added_tokens") or []
    if not isinstance(added, list):
        raise InputError(f"added_tokens must be a list, got {brief(repr(added))}")
    return model, {token["content"]: token for token in map(_token, added)}


def _adds_nothing(after: Any) -> bool:
    """Whether a post_processor is a template that holds only the text; transformers writes such
    templates."""
    if not isinstance(after, dict) or after.get("type") != "TemplateProcessing":
        return False
    single = after.get("single")
    texts = isinstance(single, list) and [list(_object(part)) for part in single] == [["Sequence"]]
    return texts and not after.get("special_tokens")


def _token(found: Any) -> dict[str, Any]:
    known = isinstance(found, dict) and type(found.get("id")) is int
    if not known or not isinstance(found.get("content"), str):
        raise InputError(f"added_tokens must have id and content, got {brief(found)}")
    return found


def _listed(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens in a tokenizer_config.json."""
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(i.isdecimal() for i in listed):
        raise InputError(f"added_tokens_decoder must be an object by ids, got {brief(listed)}")
    return [_token({**_object(token), "id": int(i)}) for i, token in listed.items()]


def _object(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _of_vocab(path: Path, vocab: dict[str, Any]) -> dict[str, Any]:
    """vocab.json, merges.txt and added_tokens.json combined into a tokenizer.json."""
    merges = path.with_name(MERGES)
    try:
        lines = files.read_text(merges).split("\n")
    except OSError as e:
        raise InputError(f"{MERGES} must be beside it: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"{MERGES} must be a text in UTF-8: {brief(e)}") from e
    added = path.with_name(ADDED)
    extra = _read(added) if os.path.lexists(added) else {}
    if EOT in vocab:
        extra = {EOT: vocab[EOT], **extra}
    return {
        "pre_tokenizer": _BYTE_LEVEL,
        "model": {
            "vocab": vocab,
            "merges": [m for m in lines if m.strip() and not m.startswith("#version")],
        },
        "added_tokens": [
            {"content": token, "id": i, "special": True} for token, i in extra.items()
        ],
    }


def _encoder(model: dict[str, Any]):
    """A function from text to ids that uses Hugging Face's library without the added tokens."""
    import tokenizers

    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps(_state(model, {})))
    except Exception as e:  # the library raises no narrower class
        raise InputError(f"model cannot be read: {brief(e)}") from e
    return lambda text: np.array(
        encoder.encode(text, add_special_tokens=False).ids, dtype=np.uint32
    )


def _state(model: dict[str, Any], added: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of tokenizer.json for a byte-level BPE."""
    kept = {key: model[key] for key in ("vocab", "merges")}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(t["content"], t["id"]) for t in added.values()],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": model.get("ignore_merges") is True,
            **kept,
        },
    }


def _special(content: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": True}


def _read(path: Path) -> dict[str, Any]:
    return files.read_object(f"tokenizer {quoted(path)}", path, files.MAX_TEXT_BYTES)


# ---- writing


def to_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids.

    A tokenizer limited to the first ids of another is written with all ids. So AutoTokenizer
    encodes a text that we refuse, into ids that the model does not have.
    """
    tokenizer = tokenizer.whole or tokenizer
    if tokenizer.name == "hf":
        return tokenizer.state
    if tokenizer.name == "char":
        return _of_characters([token.decode() for token in tokenizer.tokens])
    ranks = tokenizer.tokens if tokenizer.eot is None else tokenizer.tokens[: tokenizer.eot]
    merges, whole = bytelevel.merges_of(ranks)
    vocab = {bytelevel.to_chars(token): i for i, token in enumerate(ranks)}
    written = [[bytelevel.to_chars(a), bytelevel.to_chars(b)] for a, b in merges]
    model = {"vocab": vocab, "merges": written, "ignore_merges": not whole}
    if tokenizer.eot is None:
        return _state(model, {})
    vocab[EOT] = tokenizer.eot
    return _state(model, {EOT: {"content": EOT, "id": tokenizer.eot}})


def _of_characters(alphabet: Sequence[str]) -> dict[str, Any]:
    """The content of tokenizer.json for characters: each is a word. Hugging Face's library also
    raises an error for a character without an id."""
    state = _state({"vocab": {}, "merges": []}, {})
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
    vocab = {character: i for i, character in enumerate(alphabet)}
    return {
        **state,
        "pre_tokenizer": {**split, "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"},
    }


def write(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Writes the files that AutoTokenizer loads, and removes those of an older tokenizer."""
    state = to_state(tokenizer)
    whole = tokenizer.whole or tokenizer
    end = None if whole.eot is None else whole.tokens[whole.eot].decode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **({} if end is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)),
    }
    for name in FILES:
        if name not in (FILE, CONFIG):
            (folder / name).unlink(missing_ok=True)
    files.write_atomic(folder / FILE, json.dumps(state, ensure_ascii=False) + "\n")
    files.write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    model = state["model"]
    if model["type"] == "BPE" and not model["ignore_merges"]:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        files.write_atomic(folder / VOCAB, json.dumps(model["vocab"], ensure_ascii=False) + "\n")
        files.write_atomic(folder / MERGES, "\n".join(["#version: 0.2", *merges]) + "\n")
