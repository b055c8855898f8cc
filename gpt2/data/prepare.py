"""`gpt2 prepare`: text to token shards in llm.c's layout, for corpora larger than memory.

The output folder holds train_*.bin, val_*.bin and tokenizer.json. It gets its final name only
when it is complete. While it is written, the ids take twice their space on disk.
"""

import os
from pathlib import Path

import numpy as np

from .. import bars, files
from ..errors import InputError, quoted
from . import documents, shards, tokenizers


def prepare(
    source: str,
    out: str | Path,
    *,
    tokenizer: str = "gpt2",
    tokenizer_dir: str | None = None,
    val_fraction: float = 0.1,
    shard_tokens: int = 2**27,
) -> dict[str, int]:
    """Writes the shards of a text source into the new folder out, and returns the numbers of
    tokens in train and val.

    The last val_fraction of the ids is for validation. Raises InputError, with nothing written,
    if the text or the tokenizer cannot be used, or out exists already.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be above 0 and below 1, got {val_fraction}")
    if not 1 <= shard_tokens <= shards.MAX_TOKENS:
        raise InputError(f"shard_tokens must be 1 to {shards.MAX_TOKENS}, got {shard_tokens}")
    out = Path(out)
    files.check_new("out", out)
    texts = documents.documents(source)
    if any(text.name.endswith(".bin") for text in texts):
        raise InputError(f"data must be text, got shards of tokens, {quoted(source)}")
    chosen = documents.tokenizer_for(texts, tokenizer, tokenizer_dir)
    if chosen.vocab_size > 65536:
        raise InputError(
            f"tokenizer must have at most 65536 ids, a shard's are uint16, got {chosen.vocab_size}"
        )

    with files.work_folder(out) as work:
        parts = _tokenize(texts, chosen, work / "ids", val_fraction)
        whole = work / "whole"
        whole.mkdir()
        for part, tokens in parts.items():
            for n, start in enumerate(range(0, len(tokens), shard_tokens)):
                shards.write(whole / f"{part}_{n:06d}.bin", tokens[start : start + shard_tokens])
        files.write_atomic(whole / tokenizers.FILE, chosen.to_json())
        os.replace(whole, out)
    return {part: len(tokens) for part, tokens in parts.items()}


def _tokenize(texts, tokenizer, path: Path, val_fraction: float) -> dict[str, np.ndarray]:
    """Writes all ids into the file path, and returns memory maps of its train and val parts."""
    total = sum(text.size for text in texts)
    with (
        bars.bar(total=total, unit="B", unit_scale=True, desc="tokenizing") as bar,
        path.open("wb") as file,
    ):
        for ids in documents.encode(texts, tokenizer, bar.update):
            with files.writing(path):
                ids.astype("<u2").tofile(file)
    tokens = np.memmap(path, dtype="<u2", mode="r")
    end = int(len(tokens) * (1 - val_fraction))
    if not 0 < end < len(tokens):
        raise InputError(
            f"data must give at least one train and one val token, got {len(tokens)} ids"
        )
    return {"train": tokens[:end], "val": tokens[end:]}
