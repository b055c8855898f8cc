"""`gpt2 prepare`: text to token shards in llm.c's layout, for corpora larger than memory.

The folder appears under its name only when it is whole: train_*.bin, val_*.bin, tokenizer.json.
On the way there it needs room on the disk for the ids twice.
"""

import os
from pathlib import Path

import numpy as np

from . import bars, files, shards, sources
from . import tokenizer as tokenizers
from .errors import InputError, quoted
from .writing import writing


def prepare(
    source: str,
    out: str | Path,
    *,
    tokenizer: str = "gpt2",
    tokenizer_dir: str | None = None,
    val_fraction: float = 0.1,
    shard_tokens: int = 2**27,
) -> dict[str, int]:
    """Writes the shards of a text source into the new folder out; the tokens in train and val.

    The last val_fraction of the ids is for validation. Raises InputError, with nothing written,
    where the text or the tokenizer cannot be used, or out is not new.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be above 0 and below 1, got {val_fraction}")
    if not 1 <= shard_tokens <= shards.MAX_TOKENS:
        raise InputError(f"shard_tokens must be 1 to {shards.MAX_TOKENS}, got {shard_tokens}")
    out = Path(out)
    files.check_new("out", out)
    texts = sources.documents(source)
    if any(text.name.endswith(".bin") for text in texts):
        raise InputError(f"data must be text, got shards of tokens, {quoted(source)}")
    chosen = sources.tokenizer_for(texts, tokenizer, tokenizer_dir)
    if chosen.vocab_size > 65536:
        raise InputError(
            f"tokenizer must have at most 65536 ids, a shard's are uint16, got {chosen.vocab_size}"
        )

    with files.work_folder(out) as work:
        parts = _tokenise(texts, chosen, work / "ids", val_fraction)
        whole = work / "whole"
        whole.mkdir()
        for part, tokens in parts.items():
            for n, start in enumerate(range(0, len(tokens), shard_tokens)):
                shards.write(whole / f"{part}_{n:06d}.bin", tokens[start : start + shard_tokens])
        files.write_atomic(whole / tokenizers.FILE, chosen.to_json())
        os.replace(whole, out)
    return {part: len(tokens) for part, tokens in parts.items()}


def _tokenise(texts, tokenizer, path: Path, val_fraction: float) -> dict[str, np.ndarray]:
    """All ids, kept in the file path, as the train and the val part of it."""
    total = sum(text.size for text in texts)
    with (
        bars.bar(total=total, unit="B", unit_scale=True, desc="tokenising") as bar,
        path.open("wb") as file,
    ):
        for ids in sources.encode(texts, tokenizer, bar.update):
            with writing(path):
                ids.astype("<u2").tofile(file)
    tokens = np.memmap(path, dtype="<u2", mode="r")
    end = int(len(tokens) * (1 - val_fraction))
    if not 0 < end < len(tokens):
        raise InputError(f"data must give a train and a val token at least, got {len(tokens)} ids")
    return {"train": tokens[:end], "val": tokens[end:]}
