"""A BPE in tiktoken's text format: on each line, a token in base64 and its rank."""

import base64

from ..errors import InputError
from .tokenizer import Tokenizer, bpe


def to_text(tokenizer: Tokenizer) -> str:
    """The tokens of a BPE in tiktoken's format. The eot, always the last id, is left out."""
    lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokenizer.tokens[:-1])]
    return "".join(lines)


def from_text(text: str) -> Tokenizer:
    """The tokenizer of such a text. (tiktoken's own reader caches a file by name forever.)"""
    ranks = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks.append(base64.b64decode(token, validate=True))
            if int(rank) != len(ranks) - 1:
                raise ValueError
        except ValueError:
            raise InputError(
                f"line {number} must be a token in base64 and its rank {number - 1}, "
                f"got {line[:40]!r}"
            ) from None
    return bpe(ranks)
