"""The default text: the prose of the language reference behind Python's help().

The topics of pydoc_data hold sentences, headings underlined with asterisks, tables, grammar and
code. Every paragraph of sentences is kept, on one line, with straight quotes and without marks of
emphasis, footnotes and lists. Paragraphs are chosen by form alone, so this works for every
version of Python, although their topics differ.
"""

import re

_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_MARKER = re.compile(r"(?:[*•+-]|\d+\.|\(\d+\)|\[\d+\])\s+")  # of a list item or footnote
_FOOTNOTE = re.compile(r"\s*\[\d+\](?=\W|$)")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])")
_VERSION = re.compile(r"(?:Changed in|New in|Added in|Deprecated since) version|Source code:")
_CODE = re.compile(r"[|{}<>=\\^~`@#$%&*+/_\[\]]|\w\(\w+, ")
_SENTENCES = re.compile(r'["\'(]?[A-Z].*[.!?]["\')]?')
_WORD = re.compile(r"(?<!\S)[A-Za-z][a-z'-]*[,.;:!?]?(?!\S)")
_LEAST_WORDS, _LEAST_PART = 6, 0.75  # of plain words in a paragraph


def prose(topic: str) -> str:
    """The paragraphs of a topic that are sentences, separated by empty lines; "" if there are
    none."""
    paragraphs = map(_clean, re.split(r"\n[ \t]*\n", topic))
    return "\n\n".join(p for p in paragraphs if _is_prose(p))


def _clean(paragraph: str) -> str:
    """A paragraph on one line, without marks of emphasis, footnotes and lists."""
    text = " ".join(paragraph.split()).translate(_STRAIGHT)
    text = _MARKER.sub("", text, count=1) if _MARKER.match(text) else text
    return _EMPHASIS.sub(r"\2", _FOOTNOTE.sub("", text))


def _is_prose(text: str) -> bool:
    if not text.isascii() or not _SENTENCES.fullmatch(text) or _VERSION.match(text):
        return False
    if _CODE.search(text):
        return False
    plain, words = len(_WORD.findall(text)), len(text.split())
    return plain >= _LEAST_WORDS and plain >= _LEAST_PART * words
