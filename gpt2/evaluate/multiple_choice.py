"""Multiple choice by likelihood: which of several endings of a text the model finds likeliest.

A file holds one question per line in JSON, in the form of HellaSwag's hellaswag_val.jsonl:

    {"ctx": "A man is sitting on a roof. He", "endings": ["is ripping level tiles off.", …],
     "label": 3}

Evaluation is completion style, as in nanoGPT and llm.c: the model reads ctx and scores
" " + ending. Both are tokenized separately and not rewritten. With log p summed over the ending's
tokens, the choice is the ending with the largest

    acc         log p
    acc_norm    log p / characters of the ending, as in lm-evaluation-harness
    acc_token   log p / tokens of " " + ending, as in llm.c

lm-evaluation-harness rewrites HellaSwag's texts first (it prepends the activity and removes
brackets), so its figures differ. lm_eval.py runs that harness.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import files
from ..data.tokenizer import Tokenizer
from ..errors import InputError, NonFiniteError, brief, quoted
from ..model import Model
from .scoring import Window, score_all

_MAX_ENDINGS = 1000  # of a question; HellaSwag has 4
WAYS = ("acc", "acc_norm", "acc_token")


class Question(NamedTuple):
    windows: list[Window]  # one for each ending
    characters: list[int]  # of each ending
    label: int  # the index of the right ending
    cut: bool  # whether ctx was too long for the model, so its beginning was cut off


@dataclass(frozen=True)
class Accuracy:
    """The fraction of questions answered correctly, for each way to choose."""

    questions: int
    acc: float
    acc_norm: float
    acc_token: float
    cut: int  # questions whose ctx was cut
    seconds: float

    def error(self, accuracy: float) -> float | None:
        """The standard error of an accuracy p: sqrt(p (1 - p) / (n - 1)); None if n is 1."""
        n = self.questions
        return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None

    def figures(self) -> dict[str, float | int | None]:
        """All figures, as JSON values."""
        found: dict[str, float | int | None] = {}
        for name in WAYS:
            found[name] = getattr(self, name)
            found[f"{name}_stderr"] = self.error(getattr(self, name))
        return {**found, "questions": self.questions, "cut": self.cut}

    def __str__(self) -> str:
        shares = []
        for name in WAYS:
            share = getattr(self, name)
            error = self.error(share)
            shares.append(f"{name} {share:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        cut = f", {self.cut:,} of them with a ctx that was cut" if self.cut else ""
        return f"{', '.join(shares)}; {self.questions:,} questions{cut}"


def read(path: str | Path, tokenizer: Tokenizer, block_size: int) -> list[Question]:
    """The questions in a file, for a model of block_size. An empty ctx is the start of a document.

    Other keys, such as HellaSwag's ctx_a and ind, are ignored, and so are empty lines. Raises
    InputError, naming the file, line, key and value, if a question is not of the form above.
    """
    lines = files.read_lines("choices", path)
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_question(line, tokenizer, block_size))
            except ValueError as e:  # InputError is one
                raise InputError(f"choices {quoted(path)}, line {number}: {brief(e)}") from e
    if not questions:
        raise InputError(f"choices {quoted(path)} must hold one question per line, got none")
    return questions


def evaluate(
    model: Model,
    questions: Sequence[Question],
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda n: None,
) -> Accuracy:
    """The accuracy of model on questions. Of endings with equal scores, the first is chosen.

    batch_size endings go through the model at a time. progress(1) is called after each ending.
    Raises NonFiniteError if a loss is not finite.
    """
    start = time.perf_counter()
    windows = [window for question in questions for window in question.windows]
    scores = iter(score_all(model, windows, batch_size, progress))
    right = np.zeros(3)
    for question in questions:
        log_p = np.array([-next(scores).losses.sum().item() for _ in question.windows])
        if not np.isfinite(log_p).all():
            raise NonFiniteError(f"the log-probabilities of endings are {log_p.tolist()}")
        tokens = np.array([window.scored for window in question.windows])
        for i, size in enumerate((1, np.array(question.characters), tokens)):
            right[i] += np.argmax(log_p / size) == question.label
    accuracies = (right / len(questions)).tolist()
    cut, seconds = sum(q.cut for q in questions), time.perf_counter() - start
    return Accuracy(len(questions), *accuracies, cut, seconds)


def _question(line: str, tokenizer: Tokenizer, block_size: int) -> Question:
    """The question in a line. Raises ValueError, naming the key, if it is not valid."""
    found = files.parse_json(line)
    if not isinstance(found, dict):
        raise InputError(f"a question must be an object with ctx, endings and label, got {line}")
    ctx, endings = found.get("ctx"), found.get("endings")
    if not isinstance(ctx, str):
        raise InputError(f"ctx must be a string, got {_shown(found, 'ctx')}")
    if not (
        isinstance(endings, list)
        and 2 <= len(endings) <= _MAX_ENDINGS
        and all(isinstance(e, str) and e for e in endings)
    ):
        raise InputError(
            f"endings must be at least 2 strings and at most {_MAX_ENDINGS}, none empty, "
            f"got {_shown(found, 'endings')}"
        )
    label = _label(found, len(endings))
    prompt = _encode("ctx", ctx, tokenizer).tolist()
    if not prompt:
        if tokenizer.eot is None:
            raise InputError("ctx must not be empty for a tokenizer without <|endoftext|>, got ''")
        prompt = [tokenizer.eot]
    windows, cut = [], False
    for ending in endings:
        ids = _encode("endings", f" {ending}", tokenizer).tolist()
        if len(ids) > block_size:
            raise InputError(
                f"endings must be at most block_size {block_size} tokens each, got {len(ids)}"
            )
        cut |= len(prompt) + len(ids) > block_size + 1
        windows.append(Window((prompt + ids)[-block_size - 1 :], len(ids)))
    return Question(windows, [len(ending) for ending in endings], label, cut)


def _label(found: dict[str, Any], endings: int) -> int:
    """The label. It is a number in HellaSwag and a string of digits in Hugging Face's copy. Test
    splits have -1 or no label, which raises InputError."""
    label = found.get("label")
    if isinstance(label, str) and label.isascii() and label.isdigit():
        label = int(label)
    if type(label) is not int or not 0 <= label < endings:
        raise InputError(
            f"label must be 0 to {endings - 1}, the number of the right ending, "
            f"got {_shown(found, 'label')}"
        )
    return label


def _encode(key: str, text: str, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except InputError as e:
        raise InputError(f"{key}: {e}") from e


def _shown(found: dict[str, Any], key: str) -> str:
    return brief(repr(found[key])) if key in found else "no such key"
