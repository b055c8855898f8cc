"""The batches that training takes from text or token shards.

Batch k is a pure function of (seed, k), so a run resumes exactly and saves no loader state.
Shards are memory-mapped. Text is tokenized into memory at two bytes per id; use `gpt2 prepare`
for texts that do not fit.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import bars
from ..errors import InputError, quoted
from . import documents, nanogpt_meta, shards, tokenizers
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """Token ids to train or to evaluate on, as separate arrays. No window crosses from one array
    into the next."""

    parts: list[np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batch(self, seed: int, k: int, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch k: B windows drawn uniformly, as x and the next tokens y, both (B, T) int64.

        The result depends on the arguments alone, on every machine: the positions are raw words
        of Philox with the key (seed, k), and numpy guarantees that stream.
        """
        room = np.array([max(len(part) - T, 0) for part in self.parts])  # windows in each part
        ends = np.cumsum(room)
        words = np.random.Philox(key=np.array([seed, k], dtype=np.uint64)).random_raw(B)
        places = (words % np.uint64(ends[-1])).astype(np.int64)
        which = np.searchsorted(ends, places, side="right")
        starts = places - (ends - room)[which]
        rows = np.stack(
            [self.parts[p][s : s + T + 1] for p, s in zip(which, starts, strict=True)]
        ).astype(np.int64)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def windows(self, B: int, T: int, limit: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The whole split once, B windows at a time: x and y, both (B or fewer, T) int64.

        Every token except the first of each part is a target exactly once. The last window of a
        part is padded with targets of -1, which the loss ignores. A limit above 0 yields at most
        that many batches: evenly spaced, and the same ones each time.
        """
        starts = [(part, s) for part in self.parts for s in range(0, len(part) - 1, T)]
        groups = [starts[i : i + B] for i in range(0, len(starts), B)]
        if 0 < limit < len(groups):
            groups = [groups[i * len(groups) // limit] for i in range(limit)]
        for group in groups:
            x = np.zeros((len(group), T), dtype=np.int64)
            y = np.full((len(group), T), -1, dtype=np.int64)
            for row, (part, start) in enumerate(group):
                window = part[start : start + T + 1]
                x[row, : len(window) - 1] = window[:-1]
                y[row, : len(window) - 1] = window[1:]
            yield x, y


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Split
    val: Split


def load(
    source: str | None,
    block_size: int,
    *,
    tokenizer: Tokenizer | str | None = None,
    tokenizer_dir: str | None = None,
    val_fraction: float = 0.1,
    named: bool | None = None,
) -> Corpus:
    """The tokenizer of a source and its training and validation splits.

    tokenizer is a Tokenizer, or a name or file for tokenizers.named. The default for text is one
    id per character. The default for shards is the tokenizer.json or nanoGPT meta.pkl beside
    them, else GPT-2's. named says whether the user chose the tokenizer; by default, a name or
    file counts as the user's choice.

    Raises InputError, naming the source, if it cannot be read, holds an id outside the
    vocabulary, is too short for one window of block_size + 1 training tokens, or was evidently
    made with another tokenizer than the default one (see _check_made_with).
    """
    named = isinstance(tokenizer, str) if named is None else named
    paths = [] if source in (None, "-") else documents.files(source)
    if any(path.suffix == ".bin" for path in paths):
        tokenizer, sure = _shard_tokenizer(paths[0], tokenizer, tokenizer_dir, named)
        train, val = _shard_splits(source, paths, tokenizer.vocab_size, val_fraction)
        if not sure:
            _check_made_with(source, tokenizer, [*train.parts, *val.parts])
    else:
        texts = documents.documents(source)
        if isinstance(tokenizer, str) or tokenizer is None:
            tokenizer = documents.tokenizer_for(texts, tokenizer, tokenizer_dir)
        train, val = _cut(_tokenize(texts, tokenizer), val_fraction)
    if max(map(len, train.parts)) <= block_size or max(map(len, val.parts)) < 2:
        raise InputError(
            f"data {quoted(source or 'pydoc_data.topics')} must give more than block_size "
            f"{block_size} training tokens and at least 2 validation tokens, "
            f"got {len(train)} and {len(val)}"
        )
    return Corpus(tokenizer, train, val)


def whole(
    source: str,
    tokenizer: Tokenizer,
    tokenizer_dir: str | None = None,
    *,
    named: bool = False,
) -> Split:
    """All ids of a source, to evaluate on: texts packed into one array, as in training, or one
    array per shard. named says whether the user chose the tokenizer. Raises InputError, naming
    the source, for the same reasons as load."""
    paths = [] if source == "-" else documents.files(source)
    if any(path.suffix == ".bin" for path in paths):
        _check_shards(source, paths)
        tokenizer, sure = _shard_tokenizer(paths[0], tokenizer, tokenizer_dir, named)
        parts = [shards.read(path, tokenizer.vocab_size) for path in paths]
        if not sure:
            _check_made_with(source, tokenizer, parts)
        return Split(parts)
    return Split([_tokenize(documents.documents(source), tokenizer)])


def _tokenize(texts: list[documents.Document], tokenizer: Tokenizer) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    total = sum(text.size for text in texts)
    with bars.bar(total=total, unit="B", unit_scale=True, desc="tokenizing", delay=1) as bar:
        return np.concatenate(
            [ids.astype(dtype) for ids in documents.encode(texts, tokenizer, bar.update)]
        )


def _cut(tokens: np.ndarray, val_fraction: float) -> tuple[Split, Split]:
    """The training tokens, and the last val_fraction of all tokens for validation."""
    end = int(len(tokens) * (1 - val_fraction))
    return Split([tokens[:end]]), Split([tokens[end:]])


def _shard_tokenizer(
    path: Path, spec: Tokenizer | str | None, folder: str | None, named: bool
) -> tuple[Tokenizer, bool]:
    """The tokenizer of a shard, and whether it is known (from the user or from a file beside the
    shard) rather than assumed."""
    if isinstance(spec, str):
        return tokenizers.named(spec, folder), True
    beside = _beside(path, folder, named)
    if spec is None:
        return (tokenizers.gpt2(folder), False) if beside is None else (beside, True)
    if beside is not None and beside.tokens != spec.tokens:
        raise InputError(f"data {quoted(path)} must be made with the model's tokenizer")
    return spec, named or beside is not None


def _beside(path: Path, folder: str | None, named: bool) -> Tokenizer | None:
    """The tokenizer kept beside a shard: our tokenizer.json, or nanoGPT's meta.pkl.

    A meta.pkl that cannot be read is an error, unless the user named a tokenizer.
    """
    if os.path.lexists(path.with_name(tokenizers.FILE)):
        return tokenizers.load(path.with_name(tokenizers.FILE), folder)
    meta = path.with_name(nanogpt_meta.FILE)
    if not os.path.lexists(meta):
        return None
    try:
        return nanogpt_meta.load(meta)
    except InputError as e:
        if named:
            return None
        raise InputError(f"{e}; --tokenizer names the one that made {quoted(path.name)}") from e


# Any text of 256 tokens has an id beyond the first 1/8 of a BPE's vocabulary, and any text of
# 65536 tokens one beyond the first 1/2. Ids follow the order of the merges. In Shakespeare
# under GPT-2's BPE, 17 % of the ids are beyond 1/8 and 4.6 % beyond 1/2.
_REACHED = ((256, 1 / 8), (65536, 1 / 2))  # tokens, part of the vocabulary
_LEAST_BPE = 1024  # smallest vocabulary for which this holds


def _check_made_with(source: str, tokenizer: Tokenizer, parts: list[np.ndarray]) -> None:
    """Raises InputError if all ids of the shards are far below the size of a BPE's vocabulary.

    Such ids are most likely characters or bytes. Decoded with GPT-2's BPE, the default that
    nobody chose, they would be training text that was never written.
    """
    count = sum(map(len, parts))
    if tokenizer.name in ("char", "byte") or tokenizer.vocab_size < _LEAST_BPE:
        return
    for least, part in _REACHED:
        bound = int(tokenizer.vocab_size * part)
        if count >= least and not any(shards.reaches(tokens, bound) for tokens in parts):
            raise InputError(
                f"data {quoted(source)} must be made with {tokenizer.name}, the default tokenizer, "
                f"but all {count} tokens are below {bound} of its {tokenizer.vocab_size} ids: "
                f"name the tokenizer that made it with --tokenizer"
            )


def _shard_splits(
    source: str, paths: list[Path], vocab_size: int, val_fraction: float
) -> tuple[Split, Split]:
    """The training and validation splits. A single shard is cut in two; several shards are
    assigned by "train" or "val" in their names."""
    _check_shards(source, paths)
    if len(paths) == 1:
        return _cut(shards.read(paths[0], vocab_size), val_fraction)
    named = {part: [path for path in paths if part in path.name] for part in ("train", "val")}
    for part, found in named.items():
        if not found:
            raise InputError(f"data {quoted(source)} must hold a shard with {part!r} in its name")
    train, val = ([shards.read(p, vocab_size) for p in named[part]] for part in ("train", "val"))
    return Split(train), Split(val)


def _check_shards(source: str, paths: list[Path]) -> None:
    if other := [path for path in paths if path.suffix != ".bin"]:
        raise InputError(
            f"data {quoted(source)} must not mix shards with other files: {quoted(other[0])}"
        )
