"""Text to token ids and back: characters, bytes, GPT-2's BPE, or another byte-level BPE.

A tokenizer is a table from id to bytes and a function from text to ids. Decoding joins the bytes
of the ids and reads them as UTF-8, so that for every string that UTF-8 can hold

    decode(encode(text)) == text

exactly. Strings with half a surrogate pair are refused. `<|endoftext|>` in a text is thirteen
ordinary characters, unless encode is asked to see it as the token.
"""

import base64
import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import bytelevel, files
from .bytelevel import EOT, GPT2_SIZE
from .errors import InputError, brief, quoted

FILE = "tokenizer.json"  # in the folder of a run, of shards, or of a Hugging Face model

# GPT-2's cut of a text into pieces, which no merge crosses, in the form that never backtracks.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

MAX_ALPHABET = 2**18  # characters; Unicode 16 has named 155,000
MAX_VOCAB_SIZE = 2**20  # of a BPE to learn; the largest in use have 2^18
_LONGEST_PIECE = 256  # bytes of a piece that is learned from as a whole

# No piece of GPT2_PATTERN goes on from a non-space into a space: a text may be cut there.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids 0 … vocab_size - 1."""

    name: str  # char, byte, gpt2, bpe or hf
    tokens: list[bytes]  # the bytes of every id
    to_ids: Callable[[str], np.ndarray]
    eot: int | None = None  # the id that ends a document, where there is one
    state: dict[str, Any] | None = None  # Hugging Face's tokenizer.json, for name hf
    whole: "Tokenizer | None" = None  # the tokenizer whose first ids these are

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of text, (N,) uint32. With special=True, the text of the eot token, which is
        `<|endoftext|>` in GPT-2, becomes its id.

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
        """A function that takes the ids of a text one by one, and gives of each the characters that
        it makes whole; without an id, at the end, what is left."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda *ids: decode(self.decode_bytes(ids), final=not ids)

    def to_json(self) -> str:
        """What from_json needs. GPT-2's BPE is published, so its name is enough."""
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
    """The tokenizer of a model that knows only the first size ids. It refuses a text that takes
    any other, rather than to encode it in another way."""
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
        return bpe(bytelevel.published_ranks(Path(folder)), "gpt2")
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # OSError: every failure of a download is one
        raise InputError(
            "tokenizer 'gpt2': its two files can be neither found nor downloaded "
            f"({type(e).__name__}); put vocab.bpe and encoder.json into a folder and pass "
            "--tokenizer-dir FOLDER, or point TIKTOKEN_CACHE_DIR to tiktoken's cache"
        ) from e
    return bpe([encoding.decode_single_token_bytes(i) for i in range(GPT2_SIZE - 1)], "gpt2")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE of at most vocab_size ids learned from texts: 256 bytes, merges, and `<|endoftext|>`.

    Hugging Face's tokenizers picks the merges. A merge is learned after the merges that made its
    two halves, so its rank alone tells when it applies, and tiktoken encodes as the trainer does.
    The trainer's time is quadratic in the length of a piece, so it learns from parts of at most
    256 bytes. Raises InputError for a vocab_size outside 257 to 2^20.
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
        found = files.parse_json(text)
    except ValueError as e:
        raise InputError(f"a tokenizer is expected, got {brief(e)}") from e
    return _from_content(found, folder)


def _from_content(found: Any, folder: str | Path | None) -> Tokenizer:
    """The tokenizer of such a content."""
    try:
        return _from_state(found, folder)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"a tokenizer is expected, got {brief(e) or type(e).__name__}") from e


def _from_state(state: Any, folder: str | Path | None) -> Tokenizer:
    if "size" in state:
        size = state["size"]
        whole = _from_state({key: state[key] for key in state if key != "size"}, folder)
        if type(size) is not int or not 1 <= size <= whole.vocab_size:
            raise InputError(f"size must be 1 to {whole.vocab_size}, got {brief(repr(size))}")
        return first(whole, size)
    match state["name"]:
        case "char":
            if not isinstance(state["alphabet"], str):
                raise InputError(f"alphabet must be a text, got {brief(repr(state['alphabet']))}")
            return characters(state["alphabet"])
        case "byte":
            return byte()
        case "gpt2":
            return gpt2(folder)
        case "bpe":
            return bpe([base64.b64decode(t, validate=True) for t in state["ranks"]])
        case "hf":
            from . import hf_tokenizer  # not above: it builds on this module

            return hf_tokenizer.from_state(state["tokenizer"])
    name = brief(repr(state["name"]))
    raise InputError(f"name must be char, byte, gpt2, bpe or hf, got {name}")


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes a BPE whole: as JSON where the name ends in .json, else in tiktoken's text format."""
    from . import tiktoken_file  # not above: it builds on this module

    as_json = Path(path).suffix == ".json"
    text = tokenizer.to_json() if as_json else tiktoken_file.to_text(tokenizer)
    files.write_atomic(path, text)


def named(spec: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer called byte or gpt2 (whose files may be in folder), or kept in the file or
    folder spec.

    Raises InputError for any other name. (`char` needs a text: see sources.tokenizer_for.)
    """
    if spec == "byte":
        return byte()
    if spec == "gpt2":
        return gpt2(folder)
    if spec != "char" and os.path.lexists(spec):
        return load(spec, folder)
    raise InputError(
        f"tokenizer must be byte, gpt2, a file, or (for text) char, got {quoted(spec)}"
    )


def load(path: str | Path, folder: str | Path | None = None) -> Tokenizer:
    """A tokenizer from a file: the JSON of a run folder, tiktoken's ranks, nanoGPT's meta.pkl, or
    Hugging Face's tokenizer.json or vocab.json; or from a folder that holds one of Hugging Face's.

    Raises InputError, naming the file, where it cannot be read.
    """
    from . import hf_tokenizer, nanogpt_meta, tiktoken_file

    path = Path(path)
    try:
        if os.path.isdir(path):
            return _of_folder(path, folder)
        if nanogpt_meta.is_one(path):
            return nanogpt_meta.load(path)
        text = files.read_text(path)
        if not text.startswith("{"):
            return tiktoken_file.from_text(text)
        found = files.parse_json(text)
        if hf_tokenizer.is_one(path, found):
            return hf_tokenizer.load(path, found)
        return _from_content(found, folder)
    except OSError as e:
        raise InputError(f"tokenizer {quoted(path)} cannot be read: {e.strerror}") from e
    except ValueError as e:  # InputError and UnicodeDecodeError are ValueErrors
        message = str(e)
        prefix = "" if message.startswith("tokenizer ") else f"tokenizer {quoted(path)}: "
        raise InputError(prefix + message) from e


def _of_folder(path: Path, folder: str | Path | None) -> Tokenizer:
    from . import hf_tokenizer, nanogpt_meta

    names = (FILE, hf_tokenizer.VOCAB, nanogpt_meta.FILE)
    found = [name for name in names if os.path.lexists(path / name)]
    if not found:
        raise InputError(f"a folder must hold {', '.join(names[:-1])} or {names[-1]}, got none")
    path = path / found[0]
    try:
        files.check_regular(path)  # no folder in a folder, and so on
    except OSError as e:
        raise InputError(f"tokenizer {quoted(path)} cannot be read: {e.strerror}") from e
    return load(path, folder)
