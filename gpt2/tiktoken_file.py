"""A BPE in tiktoken's own text format: base64 of a token and its rank, a token a line."""

import base64

from .errors import InputError
from .tokenizer import Tokenizer, bpe


def to_text(tokenizer: Tokenizer) -> str:
    """The tokens of a BPE, but for its eot, which comes last."""
    lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokenizer.tokens[:-1])]
    return "".join(lines)


def from_text(text: str) -> Tokenizer:
    """The tokenizer of such a text. (tiktoken's reader would cache it by its name for good.)"""
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
