"""Byte-level BPEs as OpenAI's and Hugging Face's files write them: each byte is one character.

A merge joins two tokens into a third. tiktoken keeps the tokens in the order of their merges, and
no merges: a pair is joined where the result is a token. Both give the same ids, if the merge of a
token is the pair that remains when all earlier merges of its own bytes are done: by induction, no
other pair ever becomes that token. A token whose bytes do not become one pair is reached by a
whole piece of text alone, which tiktoken looks up first (`ignore_merges`).
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path

from . import files
from .errors import InputError, quoted

EOT = "<|endoftext|>"
GPT2_SIZE = 50257


def _printable() -> dict[str, int]:
    """The character of each byte: itself where Latin-1 prints it; the others from U+0100 on."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF_CHAR = _printable()
_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def to_bytes(token: str) -> bytes:
    """The bytes of a token as it is written. Raises KeyError for any other character."""
    return bytes([BYTE_OF_CHAR[c] for c in token])


def to_chars(token: bytes) -> str:
    """A token as it is written."""
    return "".join([_CHAR_OF_BYTE[b] for b in token])


def merges_of(ranks: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The merges that make tiktoken's tokens, in order; and whether they make all of them."""
    table = {token: rank for rank, token in enumerate(ranks)}
    merges, whole = [], True
    for rank, token in enumerate(ranks):
        parts = _parts(token, rank, table)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        elif len(parts) > 2:
            whole = False
    return merges, whole


def _parts(token: bytes, rank: int, table: dict[bytes, int]) -> list[bytes]:
    """What the merges before rank leave of a token: always the pair of the lowest rank is joined,
    of equal ones the first. A heap of pairs: n bytes take n log n steps."""
    ends = list(range(1, len(token) + 1))  # of the part that starts at each byte
    before = list(range(-1, len(token) - 1))  # the start of the part before it; -1: none
    heap: list[tuple[int, int, int]] = []

    def offer(start: int) -> None:
        if start >= 0 and ends[start] < len(token):
            end = ends[ends[start]]
            found = table.get(token[start:end], rank)
            if found < rank:
                heappush(heap, (found, start, end))

    for start in range(len(token)):
        offer(start)
    while heap:
        _, start, end = heappop(heap)
        middle = ends[start]
        if middle < 0 or middle >= end or ends[middle] != end:
            continue  # one of its parts has become another
        ends[start], ends[middle] = end, -1
        if end < len(token):
            before[end] = start
        offer(before[start])
        offer(start)
    starts = [start for start, end in enumerate(ends) if end > 0]
    return [token[start : ends[start]] for start in starts]


def published_ranks(folder: Path) -> list[bytes]:
    """GPT-2's 50,256 tokens in the order of their ids, checked against its list of merges."""
    try:
        ids = files.parse_json(files.read_text(folder / "encoder.json"))
        merges = files.read_text(folder / "vocab.bpe").splitlines()[1:]
        ids.pop(EOT)
        ranks = [to_bytes(token) for token in sorted(ids, key=ids.get)]
        consistent = ranks == [bytes([b]) for b in BYTE_OF_CHAR.values()] + [
            to_bytes(merge.replace(" ", "")) for merge in merges
        ]
    except OSError as e:
        raise InputError(
            f"tokenizer-dir {quoted(folder)}: {quoted(e.filename)}: {e.strerror}"
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"tokenizer-dir {quoted(folder)}: broken encoder.json or vocab.bpe") from e
    if not consistent or len(ranks) != GPT2_SIZE - 1:
        raise InputError(
            f"tokenizer-dir {quoted(folder)}: encoder.json and vocab.bpe must be GPT-2's, "
            f"50,257 ids in the order of the merges, got {len(ids) + 1} ids"
        )
    return ranks
