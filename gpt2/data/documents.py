"""Text to train on: a file, a folder, a pattern, standard input, or the prose of Python's help().

Documents are read and tokenized in blocks, so a text may be larger than memory. Documents are
separated by `<|endoftext|>` if the tokenizer has it, otherwise by a newline.
"""

import codecs
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import files as readers
from ..errors import InputError, quoted
from ..files import folders
from . import reference_text, tokenizers
from .tokenizer import Tokenizer

BLOCK_BYTES = 2**18  # of text, decoded at a time
_EXCERPT_LINES = 100_000


@dataclass(frozen=True)
class Document:
    """One text in UTF-8: a file, or bytes already in memory."""

    name: str
    open: Callable[[], BinaryIO]
    size: int  # bytes

    def blocks(self, progress: Callable[[int], object] = lambda n: None) -> Iterator[str]:
        """The text, a block at a time. progress(n) is called after each block of n bytes.

        Raises InputError, with the offset of the first bad byte, if the text is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset = 0
        with self.open() as file:
            while True:
                block = file.read(BLOCK_BYTES)
                held = len(decoder.getstate()[0])  # bytes of a character that spans two blocks
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as e:
                    raise InputError(
                        f"data {quoted(self.name)} must be UTF-8, "
                        f"got {e.object[e.start]:#04x} at byte {offset - held + e.start}"
                    ) from None
                if not block:
                    return
                offset += len(block)
                progress(len(block))
                yield text


def files(source: str) -> list[Path]:
    """The files that a source names, sorted by path.

    A folder stands for its `.bin` files or, if it has none, for every file below it that is not
    hidden. Raises InputError if there is no such file.
    """
    readers.check_name("data", source)
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.bin")) or sorted(folders.below(source))
    elif path.exists():
        found = [path]
    else:
        found = list(map(Path, folders.matching(source)))
    if not found:
        raise InputError(
            f"data must be a file, a folder with files, a pattern that matches some, or - for "
            f"standard input, got {quoted(source)}"
        )
    return found


def documents(source: str | None) -> list[Document]:
    """The texts of a source, without empty ones. Raises InputError if nothing is left."""
    if source is None:
        found = _python_reference()
    elif source == "-":
        found = [_in_memory("-", readers.read_stdin("data"))]
    else:
        found = [_document(path) for path in files(source)]
    texts = [document for document in found if document.size]
    if not texts:
        raise InputError(f"data {quoted(source)} is empty")
    return texts


def tokenizer_for(texts: list[Document], spec: str | None, folder: str | None) -> Tokenizer:
    """The tokenizer that spec names (see tokenizers.named); by default, one id for each character
    in the texts."""
    if spec not in (None, "char"):
        return tokenizers.named(spec, folder)
    alphabet = {"\n"} if len(texts) > 1 else set()
    for document in texts:
        for block in document.blocks():
            alphabet.update(block)
    return tokenizers.char(alphabet)


def encode(
    texts: list[Document],
    tokenizer: Tokenizer,
    progress: Callable[[int], object] = lambda n: None,
) -> Iterator[np.ndarray]:
    """The ids of all texts in order, with separators between them; one array per block.

    Raises InputError, naming the text, if the tokenizer cannot encode it.
    """
    for i, document in enumerate(texts):
        if i:
            eot = tokenizer.eot  # may be 0, so compare with None
            yield tokenizer.encode("\n") if eot is None else np.array([eot])
        blocks = document.blocks(progress)
        anywhere = tokenizer.name in ("char", "byte")  # safe: no token spans two blocks
        for text in blocks if anywhere else tokenizers.cut(blocks):
            try:
                ids = tokenizer.encode(text)
            except InputError as e:
                raise InputError(f"data {quoted(document.name)}: {e}") from e
            yield ids


def excerpt(source: str | None, tokenizer: Tokenizer, size: int) -> np.ndarray:
    """The first `size` ids of a source's texts. Lines that tokenizer cannot encode are skipped;
    at most 100,000 lines are read."""
    found, total = [np.array([], dtype=np.uint32)], 0
    for line in itertools.islice(_lines(source), _EXCERPT_LINES):
        try:
            found.append(tokenizer.encode(line))
        except InputError:
            continue
        total += len(found[-1])
        if total >= size:
            break
    return np.concatenate(found)[:size]


def _lines(source: str | None) -> Iterator[str]:
    """The lines of a source's texts, with line ends. A line that spans two blocks is yielded in
    two pieces."""
    for document in documents(source):
        for text in document.blocks():
            yield from text.splitlines(keepends=True)


def _document(path: Path) -> Document:
    try:
        with readers.open_regular(path) as file:
            size = readers.size_of(file)
    except OSError as e:
        raise InputError(
            f"data {quoted(path)} cannot be read: {e.strerror}{readers.hint(e)}"
        ) from e
    return Document(str(path), lambda: readers.open_regular(path), size)


def _in_memory(name: str, text: bytes) -> Document:
    return Document(name, lambda: io.BytesIO(text), len(text))


def _python_reference() -> list[Document]:
    """The prose of the language reference behind Python's help(), topic by topic. In Python 3.11
    this keeps 139,000 of 465,000 characters."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "data must be given: this Python comes without pydoc_data.topics, the default text"
        ) from None
    return [
        _in_memory(f"pydoc_data.topics[{key!r}]", f"{text}\n".encode())
        for key in sorted(topics)
        if (text := reference_text.prose(topics[key]))
    ]
