"""Text to token ids and back: characters, bytes, GPT-2's BPE, or another byte-level BPE.

A tokenizer is a table from id to bytes and a function from text to ids. Decoding joins the bytes
of the ids and decodes them as UTF-8, so every string that UTF-8 can encode makes the round trip:

    decode(encode(text)) == text

Strings with half a surrogate pair are refused. `<|endoftext|>` in a text is thirteen ordinary
characters, unless encode is called with special=True.
"""

import base64
import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, brief
from . import bytelevel
from .bytelevel import EOT, GPT2_SIZE

FILE = "tokenizer.json"  # in the folder of a run, of shards, or of a Hugging Face model

# GPT-2's pattern for splitting text into pieces, written so that it never backtracks. No merge
# crosses from one piece into the next.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

MAX_ALPHABET = 2**18  # characters; Unicode 16 has named 155,000
MAX_VOCAB_SIZE = 2**20  # of a BPE to learn; the largest in use have 2^18
_LONGEST_PIECE = 256  # bytes; BPE training splits longer pieces

# Safe places to cut a text: no piece of GPT2_PATTERN continues from a non-space into a space.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids 0 … vocab_size - 1."""

    name: str  # char, byte, gpt2, bpe or hf
    tokens: list[bytes]  # the bytes of every id
    to_ids: Callable[[str], np.ndarray]
    eot: int | None = None  # the id that ends a document, if there is one
    state: dict[str, Any] | None = None  # Hugging Face's tokenizer.json, for name hf
    whole: "Tokenizer | None" = None  # the tokenizer whose first ids these are

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of text, (N,) uint32. With special=True, the text of the eot token
        (`<|endoftext|>` in GPT-2) is encoded as its id.

        Raises InputError for half a surrogate pair, and for a character outside the alphabet.
        """
        if not isinstance(text, str):
            raise InputError(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError(
                f"text must be encodable as UTF-8, got half a surrogate pair "
                f"(U+{ord(text[e.start]):04X}) at character {e.start}"
            ) from None
        if not special or self.eot is None:
            return self.to_ids(text).astype(np.uint32)
        eot = np.array([self.eot], dtype=np.uint32)
        first, *rest = map(self.encode, text.split(self.tokens[self.eot].decode()))
        return np.concatenate([first, *(part for ids in rest for part in (eot, ids))])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. Raises InputError for an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise InputError(f"token ids must be 0 to {self.vocab_size - 1}, got {bad}")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> Callable[..., str]:
        """A function that decodes ids one by one: decode(id) returns the characters that this id
        completes, and decode(), called at the end, returns the rest."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda *ids: decode(self.decode_bytes(ids), final=not ids)

    def to_json(self) -> str:
        """The tokenizer as JSON, for from_json. GPT-2's BPE is published, so its name is enough."""
        return json.dumps(self._described(), ensure_ascii=False) + "\n"

    def _described(self) -> dict[str, Any]:
        if self.whole is not None:
            return {**self.whole._described(), "size": self.vocab_size}
        match self.name:
            case "char":
                return {"name": "char", "alphabet": b"".join(self.tokens).decode()}
            case "bpe":
                ranks = [base64.b64encode(t).decode() for t in self.tokens[:-1]]
                return {"name": "bpe", "ranks": ranks}
            case "hf":
                return {"name": "hf", "tokenizer": self.state}
        return {"name": self.name}


def first(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """The tokenizer limited to its first size ids, for a model with a smaller vocabulary. A text
    that needs any other id is refused, not encoded differently."""
    if size >= tokenizer.vocab_size:
        return tokenizer
    whole = tokenizer.whole or tokenizer

    def to_ids(text: str) -> np.ndarray:
        ids = whole.to_ids(text)
        if ids.size and ids.max() >= size:
            beyond = int(ids[ids >= size][0])
            raise InputError(
                f"text must be made of the model's {size} ids, got id {beyond}, "
                f"{whole.decode([beyond])!r}"
            )
        return ids

    eot = whole.eot if whole.eot is not None and whole.eot < size else None
    return Tokenizer(whole.name, whole.tokens[:size], to_ids, eot, whole=whole)


def char(alphabet: Iterable[str]) -> Tokenizer:
    """One id for each character of alphabet, in the order of their code points."""
    return characters(sorted(set(alphabet)))


def characters(alphabet: Sequence[str]) -> Tokenizer:
    """One id for each character of alphabet, in this order."""
    if not alphabet:
        raise InputError("alphabet must hold at least one character, got none")
    if len(alphabet) > MAX_ALPHABET:
        raise InputError(
            f"alphabet must hold at most {MAX_ALPHABET} characters, got {len(alphabet)}"
        )
    if odd := [c for c in alphabet if len(c) != 1 or "\ud800" <= c <= "\udfff"]:
        raise InputError(f"alphabet must hold single characters, got {brief(ascii(odd[0]))}")
    if len(set(alphabet)) < len(alphabet):
        raise InputError("alphabet must hold no character twice")
    codes = np.array([ord(c) for c in alphabet])
    used = np.unique(codes >> 8)  # pages of 256 code points: a flat table would take megabytes
    page = np.zeros(0x1100, dtype=np.int64)
    page[used] = np.arange(1, len(used) + 1)  # page 0: no character has an id
    table = np.full((len(used) + 1, 256), -1)
    table[page[codes >> 8], codes & 255] = np.arange(len(alphabet))

    def to_ids(text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = table[page[codes >> 8], codes & 255]
        if ids.size and ids.min() < 0:
            unknown = text[int(np.argmin(ids))]
            raise InputError(
                f"character {unknown!r} (U+{ord(unknown):04X}) is not among the "
                f"{len(alphabet)} characters of this tokenizer"
            )
        return ids

    return Tokenizer("char", [c.encode() for c in alphabet], to_ids)


def byte() -> Tokenizer:
    """One id for each byte of UTF-8. It encodes every text and needs no training."""
    return Tokenizer(
        "byte",
        [bytes([b]) for b in range(256)],
        lambda text: np.frombuffer(text.encode(), dtype=np.uint8),
    )


def bpe(ranks: list[bytes], name: str = "bpe") -> Tokenizer:
    """Byte-pair encoding by tiktoken. A token's id is the rank of its merge; eot is the last id."""
    import tiktoken

    table = {token: rank for rank, token in enumerate(ranks)}
    if len(table) < len(ranks) or not all(bytes([b]) in table for b in range(256)):
        raise InputError("BPE ranks must hold every single byte, and no token twice")
    eot = len(ranks)
    encoding = tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=table, special_tokens={EOT: eot}
    )
    return Tokenizer(
        name,
        [*ranks, EOT.encode()],
        lambda text: encoding.encode_to_numpy(text, disallowed_special=()),
        eot,
    )


def gpt2(folder: str | Path | None = None) -> Tokenizer:
    """GPT-2's own BPE, 50,257 ids, from vocab.bpe and encoder.json.

    The two files are read from folder. Without a folder, tiktoken downloads them once and keeps
    them in TIKTOKEN_CACHE_DIR. Raises InputError if they can neither be found nor downloaded.
    """
    if folder is not None:
        return bpe(bytelevel.published_ranks(Path(folder)), "gpt2")
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # every failed download is an OSError
        raise InputError(
            "tokenizer 'gpt2': its two files can be neither found nor downloaded "
            f"({type(e).__name__}); put vocab.bpe and encoder.json into a folder and pass "
            "--tokenizer-dir FOLDER, or point TIKTOKEN_CACHE_DIR to tiktoken's cache"
        ) from e
    return bpe([encoding.decode_single_token_bytes(i) for i in range(GPT2_SIZE - 1)], "gpt2")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE of at most vocab_size ids learned from texts: 256 bytes, merges, and `<|endoftext|>`.

    Hugging Face's tokenizers library chooses the merges. A merge is learned after the merges of
    its two halves, so its rank alone determines when it applies, and tiktoken encodes as the
    trainer does. The trainer's time is quadratic in the length of a piece, so pieces are split
    into parts of at most 256 bytes. Raises InputError for a vocab_size outside 257 to 2^20.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"vocab_size must be at least 257 (256 bytes and {EOT}) and at most {MAX_VOCAB_SIZE}, "
            f"got {vocab_size}"
        )
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST_PIECE}}}"), "isolated")
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pieces, parts])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(bytelevel.BYTE_OF_CHAR),
        show_progress=False,
    )
    trainee.train_from_iterator(cut(texts), trainer)
    vocab = trainee.get_vocab()
    return bpe([bytelevel.to_bytes(token) for token in sorted(vocab, key=vocab.get)])


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in blocks that can be encoded separately: their ids, joined, are those of the
    whole text."""
    held: list[str] = []
    for block in blocks:
        if match := _LAST_CUT.match(block):
            yield "".join([*held, match.group()])
            held = [block[match.end() :]]
        else:
            held.append(block)
    if held:
        yield "".join(held)
