"""Byte-level BPEs as OpenAI's and Hugging Face's files write them: each byte is one character.

A merge joins two tokens into a third. Hugging Face stores the merges. tiktoken stores only the
tokens, in merge order, and joins any pair whose result is a token. Both encode alike if each
token's merge is the pair that remains after all earlier merges have been applied to its bytes;
by induction, no other pair ever becomes that token. If the bytes of a token do not reduce to one
pair, the token only matches a whole piece of text, which tiktoken looks up first
(`ignore_merges`).
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path

from .. import files
from ..errors import InputError, quoted

EOT = "<|endoftext|>"
GPT2_SIZE = 50257


def _printable() -> dict[str, int]:
    """The byte of each character. A byte that is printable in Latin-1 is written as itself; the
    others are written as the characters from U+0100 on."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF_CHAR = _printable()
_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def to_bytes(token: str) -> bytes:
    """The bytes of a written token. Raises KeyError for a character that stands for no byte."""
    return bytes([BYTE_OF_CHAR[c] for c in token])


def to_chars(token: bytes) -> str:
    """The written form of a token: one character per byte."""
    return "".join([_CHAR_OF_BYTE[b] for b in token])


def merges_of(ranks: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The merges that produce tiktoken's tokens, in order, and whether they produce all tokens."""
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
    """The parts of a token after all merges below rank. The pair of the lowest rank is joined
    first, the leftmost of equal ones. A heap of pairs makes this O(n log n) for n bytes."""
    ends = list(range(1, len(token) + 1))  # the end of the part that starts at each byte
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
            continue  # stale: one of its parts has been merged since
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
