"""Text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained on one's own text.

A tokenizer is a table from id to bytes and a function from text to ids. Decoding joins the bytes
of the ids and reads them as UTF-8, so that for every string that UTF-8 can hold

    decode(encode(text)) == text

exactly. Strings with half a surrogate pair are refused. `<|endoftext|>` in a text is thirteen
ordinary characters, unless encode is asked to see it as the token.
"""

import base64
import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import files
from .errors import InputError, brief

FILE = "tokenizer.json"  # in the folder of a run, or of shards
EOT = "<|endoftext|>"

# GPT-2's cut of a text into pieces, which no merge crosses, in the form that never backtracks.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

# No piece of GPT2_PATTERN goes on from a non-space into a space: a text may be cut there.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids 0 … vocab_size - 1."""

    name: str  # char, byte, gpt2 or bpe
    tokens: list[bytes]  # the bytes of every id
    to_ids: Callable[[str], np.ndarray]
    eot: int | None = None  # the id that ends a document, where there is one

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of text, (N,) uint32. With special=True, `<|endoftext|>` becomes the eot id.

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
        first, *rest = map(self.encode, text.split(EOT))
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
        """A function that takes the ids of a text one by one, and gives of each the characters that
        it makes whole; without an id, at the end, what is left."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda *ids: decode(self.decode_bytes(ids), final=not ids)

    def to_json(self) -> str:
        """What from_json needs. GPT-2's BPE is published, so its name is enough."""
        state = {"name": self.name}
        if self.name == "char":
            state["alphabet"] = b"".join(self.tokens).decode()
        elif self.name == "bpe":
            state["ranks"] = [base64.b64encode(t).decode() for t in self.tokens[:-1]]
        return json.dumps(state, ensure_ascii=False) + "\n"


def char(alphabet: Iterable[str]) -> Tokenizer:
    """One id for each character of alphabet, in the order of their code points."""
    alphabet = sorted(set(alphabet))
    if not alphabet:
        raise InputError("alphabet must hold at least one character, got none")
    codes = np.array([ord(c) for c in alphabet])
    used = np.unique(codes >> 8)  # pages of 256 code points: one table of all would be megabytes
    page = np.zeros(0x1100, dtype=np.int64)
    page[used] = np.arange(1, len(used) + 1)  # page 0 is that of characters without an id
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
    """The 256 bytes of UTF-8: nothing to learn, no text it cannot hold."""
    return Tokenizer(
        "byte",
        [bytes([b]) for b in range(256)],
        lambda text: np.frombuffer(text.encode(), dtype=np.uint8),
    )


def bpe(ranks: list[bytes], name: str = "bpe") -> Tokenizer:
    """Byte-pair encoding by tiktoken: a token's id is the rank of its merge, eot comes last."""
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

    They are taken from folder; or else by tiktoken, which keeps them in TIKTOKEN_CACHE_DIR and
    downloads them once. Raises InputError where they can neither be found nor downloaded.
    """
    if folder is not None:
        return bpe(_published_ranks(Path(folder)), "gpt2")
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # OSError: every failure of a download is one
        raise InputError(
            "tokenizer 'gpt2': its two files can be neither found nor downloaded "
            f"({type(e).__name__}); put vocab.bpe and encoder.json into a folder and pass "
            "--tokenizer-dir FOLDER, or point TIKTOKEN_CACHE_DIR to tiktoken's cache"
        ) from e
    return bpe([encoding.decode_single_token_bytes(i) for i in range(50256)], "gpt2")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE of at most vocab_size ids learned from texts: 256 bytes, merges, and `<|endoftext|>`.

    Hugging Face's tokenizers picks the merges. A merge is learned after the merges that made its
    two halves, so its rank alone tells when it applies, and tiktoken encodes as the trainer does.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size must be at least 257 (256 bytes and {EOT}), got {vocab_size}")
    from tokenizers import Tokenizer as Trainee
    from tokenizers import models, pre_tokenizers, trainers

    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(_BYTE_OF_CHAR),
        show_progress=False,
    )
    trainee.train_from_iterator(cut(texts), trainer)
    vocab = trainee.get_vocab()
    return bpe([_printed_bytes(token) for token in sorted(vocab, key=vocab.get)])


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in other blocks: encoded one by one, they give the ids of the whole text."""
    held: list[str] = []
    for block in blocks:
        if match := _LAST_CUT.match(block):
            yield "".join([*held, match.group()])
            held = [block[match.end() :]]
        else:
            held.append(block)
    if held:
        yield "".join(held)


def from_json(text: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that to_json described. Raises InputError for anything else."""
    try:
        state = files.parse_json(text)
        match state["name"]:
            case "char":
                return char(state["alphabet"])
            case "byte":
                return byte()
            case "gpt2":
                return gpt2(folder)
            case "bpe":
                return bpe([base64.b64decode(t, validate=True) for t in state["ranks"]])
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"not a tokenizer's JSON ({type(e).__name__}: {brief(e)})") from e
    name = brief(repr(state["name"]))
    raise InputError(f"tokenizer name must be char, byte, gpt2 or bpe, got {name}")


def describe(path: str | Path) -> tuple[str, int]:
    """The JSON of a run's tokenizer, and the number of its ids; GPT-2's BPE need not be here."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        is_gpt2 = files.parse_json(text) == {"name": "gpt2"}
        return text, 50257 if is_gpt2 else from_json(text).vocab_size
    except OSError as e:
        raise InputError(f"tokenizer {str(path)!r} cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise InputError(f"tokenizer {str(path)!r}: {brief(e)}") from e


def to_tiktoken(tokenizer: Tokenizer) -> str:
    """A BPE in tiktoken's own text format: base64 of a token and its rank, a token a line."""
    lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokenizer.tokens[:-1])]
    return "".join(lines)


def from_tiktoken(text: str) -> Tokenizer:
    """Reads to_tiktoken's format. (tiktoken's reader would cache the file by its name for good.)"""
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


def named(spec: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer called byte or gpt2 (whose files may be in folder), or kept in the file spec.

    Raises InputError for any other name. (`char` needs a text: see sources.tokenizer_for.)
    """
    if spec == "byte":
        return byte()
    if spec == "gpt2":
        return gpt2(folder)
    if spec != "char" and Path(spec).is_file():
        return load(spec, folder)
    raise InputError(f"tokenizer must be byte, gpt2, a file, or (for text) char, got {spec!r}")


def load(path: str | Path, folder: str | Path | None = None) -> Tokenizer:
    """A tokenizer from a file: the JSON of a run folder, or tiktoken's ranks.

    Raises InputError, naming the file, where it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return from_json(text, folder) if text.startswith("{") else from_tiktoken(text)
    except OSError as e:
        raise InputError(f"tokenizer {str(path)!r} cannot be read: {e.strerror}") from e
    except ValueError as e:  # InputError and UnicodeDecodeError are ValueErrors
        raise InputError(f"tokenizer {str(path)!r}: {e}") from e


def _printable() -> dict[str, int]:
    """The character by which OpenAI's files (and Hugging Face's) write each byte.

    A printable byte of Latin-1 stands for itself; the others are numbered from U+0100 on.
    """
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF_CHAR = _printable()


def _printed_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF_CHAR[c] for c in token)


def _published_ranks(folder: Path) -> list[bytes]:
    """GPT-2's 50,256 tokens in the order of their ids, checked against its list of merges."""
    try:
        ids = files.parse_json((folder / "encoder.json").read_text(encoding="utf-8"))
        merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        ids.pop(EOT)
        ranks = [_printed_bytes(token) for token in sorted(ids, key=ids.get)]
        consistent = ranks == [bytes([b]) for b in _BYTE_OF_CHAR.values()] + [
            _printed_bytes(merge.replace(" ", "")) for merge in merges
        ]
    except OSError as e:
        raise InputError(f"tokenizer-dir {str(folder)!r}: {e.filename}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"tokenizer-dir {str(folder)!r}: broken encoder.json or vocab.bpe") from e
    if not consistent or len(ranks) != 50256:
        raise InputError(
            f"tokenizer-dir {str(folder)!r}: encoder.json and vocab.bpe must be GPT-2's, "
            f"50,257 ids in the order of the merges, got {len(ids) + 1} ids"
        )
    return ranks
