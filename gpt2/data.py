"""The batches that training takes from text or token shards.

Batch k is a pure function of (seed, k): a run goes on exactly where it stopped, with no state of
a loader to save. Shards stay on disk, memory-mapped; text is tokenised into memory, two bytes an
id (larger texts: `gpt2 prepare`).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import bars, nanogpt_meta, shards, sources
from . import tokenizer as tokenizers
from .errors import InputError, quoted
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """Token ids to train or to evaluate on: arrays that no window crosses."""

    parts: list[np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batch(self, seed: int, k: int, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch k: B windows drawn uniformly, as x and the next tokens y, both (B, T) int64.

        A function of its arguments alone, on every machine: the places come from the raw words
        of Philox under the key (seed, k), a stream that numpy keeps fixed.
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

        Every token but the first of a part is a target exactly once; the ragged end of a part is
        filled with targets of -1, which the loss ignores. With a limit, only that many batches,
        spread evenly and always the same.
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
    """Everything that training needs to know of its data.

    A tokenizer may be given as itself, or as a name or file (tokenizer.named). By default text
    is read by characters, and shards by the tokenizer.json or nanoGPT's meta.pkl beside them, or
    else GPT-2's. named says whether the user named it; by default a name or file counts as such.

    Raises InputError, naming the source, where it cannot be read, holds an id that is not in the
    vocabulary, is too short for one window of block_size + 1 training tokens, or is not made with
    a tokenizer that nobody named (see _check_made_with).
    """
    named = isinstance(tokenizer, str) if named is None else named
    paths = [] if source in (None, "-") else sources.files(source)
    if any(path.suffix == ".bin" for path in paths):
        tokenizer, sure = _shard_tokenizer(paths[0], tokenizer, tokenizer_dir, named)
        train, val = _shard_splits(source, paths, tokenizer.vocab_size, val_fraction)
        if not sure:
            _check_made_with(source, tokenizer, [*train.parts, *val.parts])
    else:
        texts = sources.documents(source)
        if isinstance(tokenizer, str) or tokenizer is None:
            tokenizer = sources.tokenizer_for(texts, tokenizer, tokenizer_dir)
        train, val = _cut(_tokenise(texts, tokenizer), val_fraction)
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
    """All ids of a source, to evaluate on: its texts as one array, as training packs them; of
    shards, an array each. named says whether the user named the tokenizer. Raises InputError,
    naming the source, as load does."""
    paths = [] if source == "-" else sources.files(source)
    if any(path.suffix == ".bin" for path in paths):
        _check_shards(source, paths)
        tokenizer, sure = _shard_tokenizer(paths[0], tokenizer, tokenizer_dir, named)
        parts = [shards.read(path, tokenizer.vocab_size) for path in paths]
        if not sure:
            _check_made_with(source, tokenizer, parts)
        return Split(parts)
    return Split([_tokenise(sources.documents(source), tokenizer)])


def _tokenise(texts: list[sources.Document], tokenizer: Tokenizer) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    total = sum(text.size for text in texts)
    with bars.bar(total=total, unit="B", unit_scale=True, desc="tokenising", delay=1) as bar:
        return np.concatenate(
            [ids.astype(dtype) for ids in sources.encode(texts, tokenizer, bar.update)]
        )


def _cut(tokens: np.ndarray, val_fraction: float) -> tuple[Split, Split]:
    """Training tokens, and the last val_fraction of all to validate on."""
    end = int(len(tokens) * (1 - val_fraction))
    return Split([tokens[:end]]), Split([tokens[end:]])


def _shard_tokenizer(
    path: Path, spec: Tokenizer | str | None, folder: str | None, named: bool
) -> tuple[Tokenizer, bool]:
    """The tokenizer of a shard, and whether the user or a file beside the shard says so."""
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


# Text of so many tokens has an id in the upper part of a BPE's vocabulary. Ids are in the order of
# the merges: of Shakespeare's in GPT-2's, 17 % are beyond an eighth and 4.6 % beyond a half.
_REACHED = ((256, 1 / 8), (65536, 1 / 2))  # tokens, part of the vocabulary
_LEAST_BPE = 1024  # ids of a BPE for which that is so


def _check_made_with(source: str, tokenizer: Tokenizer, parts: list[np.ndarray]) -> None:
    """Raises InputError where the ids of shards are all far below the vocabulary of a BPE.

    Characters or bytes read by GPT-2's tokenizer, which nobody named, would train on words that
    are not there.
    """
    count = sum(map(len, parts))
    if tokenizer.name in ("char", "byte") or tokenizer.vocab_size < _LEAST_BPE:
        return
    for least, part in _REACHED:
        bound = int(tokenizer.vocab_size * part)
        if count >= least and not any(shards.reaches(tokens, bound) for tokens in parts):
            raise InputError(
                f"data {quoted(source)} must be made with the tokenizer {tokenizer.name}, which "
                f"nobody named, but of its {tokenizer.vocab_size} ids all {count} tokens are below "
                f"{bound}: name the tokenizer that made it with --tokenizer"
            )


def _shard_splits(
    source: str, paths: list[Path], vocab_size: int, val_fraction: float
) -> tuple[Split, Split]:
    """One shard is cut in two; of several, the names say which are for training and validation."""
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
