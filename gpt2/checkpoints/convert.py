"""Conversion between formats: `gpt2 convert`, and the models that `gpt2 train --init` reads.

    hf       Hugging Face's folder, or a published name     huggingface.py
    run      the folder of one of our runs                  checkpoint.py
    nanogpt  nanoGPT's ckpt.pt, build-nanogpt's model.pt    nanogpt.py
    llmc     llm.c's model.bin                              llmc.py

Every weight keeps its bits and its dtype. The sizes and dropout are kept, but llm.c's format has
no dropout: it reads as 0. The state of an optimizer is dropped.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .. import files
from ..config import Config
from ..data import hf_tokenizer, tokenizers
from ..errors import InputError, brief, quoted
from . import checkpoint, hub, huggingface, llmc, nanogpt, weights
from .weights import State

FORMATS = ("hf", "run", "nanogpt", "llmc")
DTYPES = ("float32", "bfloat16", "float16")
_CKPT = "ckpt.pt"
_GPT2_JSON = '{"name": "gpt2"}\n'


@dataclass(frozen=True)
class Source:
    """A model in a file. Its weights are read only when state is called."""

    name: str  # as it was given
    format: str
    path: Path
    config: Config
    state: Callable[[], State]
    gelu: str = "tanh"  # or erf: the GELU that the model was trained with


def own_tokenizer(model: Source, folder: str | Path | None = None) -> tokenizers.Tokenizer | None:
    """The tokenizer stored with a run or a Hugging Face folder, else None. folder holds GPT-2's
    tokenizer files."""
    if model.format == "run":
        return tokenizers.load(model.path / tokenizers.FILE, folder)
    if model.format == "hf" and not hub.is_published(model.name) and hf_tokenizer.is_in(model.path):
        try:
            return tokenizers.load(model.path, folder)
        except InputError as e:
            raise InputError(f"{e}; --tokenizer names another") from e
    return None


def read(source: str | Path, *, dropout: float | None = None) -> Source:
    """The model that source names; its format is detected.

    Hugging Face's config.json has three dropout rates. dropout=None requires them to be equal;
    a number replaces them. Raises InputError, naming the file, if it is broken, of no known
    format, or holds a model that is not a GPT-2.
    """
    if not isinstance(source, (str, Path)):
        raise InputError(f"model must be a name or a path, got {brief(repr(source))}")
    name, path = str(source), Path(source)
    if hub.is_published(name):
        path = hub.download(name, huggingface.FILES)
    elif os.path.lexists(path / checkpoint.FILE):
        file = path / checkpoint.FILE
        config, _ = checkpoint.read(file)
        return Source(name, "run", path, config, lambda: checkpoint.state(file, config))
    elif os.path.lexists(path / _CKPT):
        path = path / _CKPT
    if os.path.isdir(path):
        config = huggingface.read_config(path, dropout=dropout)
        huggingface.check(path, config)
        return Source(name, "hf", path, config, lambda: huggingface.read_state(path, config))
    if os.path.isfile(path) and llmc.is_one(path):
        config = llmc.read_config(path)
        return Source(name, "llmc", path, config, lambda: llmc.read_state(path, config))
    if os.path.isfile(path) and nanogpt.is_one(path):
        config, state, gelu = nanogpt.read(path)
        return Source(name, "nanogpt", path, config, lambda: state, gelu)
    if os.path.lexists(path):
        _check_regular("model", path)
    raise InputError(
        f"model must be {', '.join(hub.PUBLISHED)}, a folder of Hugging Face's or of a run, "
        f"nanoGPT's ckpt.pt or llm.c's model.bin, got {quoted(name)}"
    )


def _check_regular(what: str, path: Path) -> None:
    try:
        files.check_regular(path)
    except OSError as e:
        raise InputError(f"{what} {quoted(path)} cannot be read: {e.strerror}") from e


def convert(
    source: str | Path,
    dest: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    max_shard_size: str | None = None,
) -> Source:
    """Writes the model of source to dest, a new file or folder in the format `to`.

    Returns the source with the configuration that was written.

    dtype rounds the weights to float32, bfloat16 or float16. vocab_size keeps only the first
    tokens, to remove padding. tokenizer is stored with a run or a Hugging Face folder: byte, gpt2
    or a file (default: the source's own; without one, GPT-2's for a run and none for hf).
    max_shard_size is for hf. Raises InputError, with nothing written, if the options do not fit
    the model or each other.
    """
    _check_choice("to", to, FORMATS)
    _check_choice("dtype", dtype, (None, *DTYPES))
    if tokenizer is not None and to not in ("hf", "run"):
        raise InputError(f"tokenizer must be absent: format {to} has none, got {quoted(tokenizer)}")
    if max_shard_size is not None and to != "hf":
        raise InputError(
            f"max_shard_size must be absent for format {to}, got {quoted(max_shard_size)}"
        )
    shard_bytes = huggingface.parse_bytes(max_shard_size or huggingface.MAX_SHARD_SIZE)
    (files.check_new_folder if to in ("hf", "run") else files.check_new)("dest", dest)
    model = read(source)
    if to != "nanogpt":
        nanogpt.say(model)
    elif model.gelu == "tanh":
        nanogpt.say_written()
    config, state = weights.crop(model.config, model.state(), vocab_size=vocab_size)
    if dtype is not None:
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    if to == "hf":
        reads = _hf_tokenizer(model, config, tokenizer)
        huggingface.write(config, state, dest, tokenizer=reads, max_shard_size=shard_bytes)
        if reads is None and model.format == "hf":
            _copy_tokenizer(model.path, Path(dest))
    elif to == "run":
        _write_run(config, state, Path(dest), _tokenizer_json(model, config, tokenizer))
    elif to == "nanogpt":
        nanogpt.write(config, state, Path(dest))
    else:
        llmc.write(config, state, Path(dest))
    return replace(model, config=config)


def _write_run(config: Config, state: State, folder: Path, tokenizer_json: str) -> None:
    """Writes a folder that `gpt2 sample` and `--init` read. It has no training options, so
    `--resume` refuses it."""
    files.make_folder("dest", folder)
    files.write_atomic(folder / tokenizers.FILE, tokenizer_json)
    files.write_atomic(
        folder / "config.json", json.dumps({"model": asdict(config)}, indent=2) + "\n"
    )
    checkpoint.write(folder / checkpoint.FILE, config, state, step=0)


def _tokenizer_json(model: Source, config: Config, spec: str | None) -> str:
    """The content of tokenizer.json for the new run. GPT-2's own files are not needed for it."""
    if spec is not None and spec != "gpt2":
        named = tokenizers.named(spec)
        text, size = named.to_json(), named.vocab_size
    elif spec is None and model.format == "run":
        text, size = described(model.path / tokenizers.FILE)
    elif spec is None and (own := own_tokenizer(model)) is not None:
        text, size = own.to_json(), own.vocab_size
    else:
        text, size = _GPT2_JSON, tokenizers.GPT2_SIZE
    if size != config.vocab_size:
        raise InputError(
            f"tokenizer must fit the model's vocab_size {config.vocab_size}, got {size} ids; "
            f"--tokenizer names another, --vocab-size crops the model's"
        )
    return text


def _hf_tokenizer(model: Source, config: Config, spec: str | None) -> tokenizers.Tokenizer | None:
    """The tokenizer to write for transformers. None if the model has none, or if its files are
    to be copied unchanged."""
    if spec is None and model.format == "hf":
        for path in _tokenizer_files(model.path):
            _check_regular("tokenizer", path)
        return None
    try:
        if spec is not None:
            reads = tokenizers.named(spec)
        elif model.format == "run":
            reads = tokenizers.load(model.path / tokenizers.FILE)
        else:
            return None
    except InputError as e:
        if spec is not None:
            raise
        warnings.warn(f"{quoted(model.name)}: its tokenizer cannot be written: {e}", stacklevel=3)
        return None
    if reads.vocab_size > config.vocab_size:
        if spec is None:  # the tokenizer of a run that --vocab-size crops
            return tokenizers.first(reads, config.vocab_size)
        raise InputError(
            f"tokenizer must have at most the model's {config.vocab_size} ids, "
            f"got {reads.vocab_size}; --tokenizer names another"
        )
    return reads


def _copy_tokenizer(source: Path, dest: Path) -> None:
    """Copies the tokenizer files of a Hugging Face folder unchanged."""
    for path in _tokenizer_files(source):
        files.write_atomic(dest / path.name, partial(shutil.copyfile, path))


def _tokenizer_files(folder: Path) -> list[Path]:
    paths = [folder / name for name in hf_tokenizer.FILES]
    return [path for path in paths if os.path.lexists(path)]


def described(path: str | Path) -> tuple[str, int]:
    """The JSON of a run's tokenizer and its number of ids. GPT-2's own files are not needed."""
    try:
        text = files.read_text(path)
        state = files.parse_json(text)
        if isinstance(state, dict) and state.get("name") == "gpt2":
            size = state.get("size", tokenizers.GPT2_SIZE)
            if type(size) is not int or not 1 <= size <= tokenizers.GPT2_SIZE:
                raise InputError(
                    f"size must be 1 to {tokenizers.GPT2_SIZE}, got {brief(repr(size))}"
                )
            return text, size
        return text, tokenizers.from_json(text).vocab_size
    except OSError as e:
        raise InputError(f"tokenizer {quoted(path)} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"tokenizer {quoted(path)}: {brief(e)}") from e


def _check_choice(name: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        expected = ", ".join(c for c in choices if c is not None)
        raise InputError(f"{name} must be one of {expected}, got {brief(repr(value))}")
