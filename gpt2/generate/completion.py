"""Continues prompts with text, and streams it as it is sampled.

Prompts are continued in batches; each step adds one token to every prompt. A text ends at
max_new_tokens, at the end of the document (`<|endoftext|>`), or before a stop string. Text that
may be the beginning of a stop string is held back until that is decided.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from .. import bars, files
from ..data.tokenizer import Tokenizer
from ..errors import InputError, brief, quoted
from ..model import Model
from . import decoding
from .sampling import Sampling, as_int, check_step


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation."""

    prompt: str
    text: str
    tokens: int  # number sampled, including the one that ended the text
    finish: str  # why it ended: length, end (of the document) or stop (a stop string)


@dataclass
class Speed:
    """Totals over steps of decoding. The first step of each batch, which reads the prompts, is not
    counted."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0  # the least that these steps must have read

    def __str__(self) -> str:
        rate = bars.per_second(self.tokens, self.seconds)
        a_step = f"{1e3 * self.seconds / self.steps:.3g} ms a step"
        return f"{self.tokens:,} tokens, {bars.shown(rate, ',.1f')} tokens/s, {a_step}"


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = decoding.DEFAULT,
    *,
    seed: int | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    speed: Speed | None = None,
) -> Iterator[str | Completion]:
    """For each prompt in order, yields pieces of text as they are sampled, never a part of a
    character, then its Completion.

    The text after a prompt depends only on the prompt and the seed (see decoding.tokens for the
    limits); equal prompts get different texts. An empty prompt starts a new document. Every step
    is added to speed.

    Raises InputError, before anything is sampled, if a prompt cannot be encoded, a stop string is
    empty, or batch_size prompts do not fit in memory. Raises NonFiniteError, naming the step, if
    the logits allow no token.
    """
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{name} must be a list of strings, got {brief(repr(texts))}")
    if as_int("batch_size", batch_size) < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not all(stop):
        raise InputError("stop must be strings of at least one character, got an empty one")
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    seeds = decoding.seeds_of(ids, seed)
    if ids:
        lengths = sorted(map(len, ids))[-batch_size:]
        decoding.check_batch(model, lengths, max_new_tokens)

    def batches():
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            texts = [_Text(prompt, tokenizer, stop) for prompt in prompts[part]]
            yield from _batch(model, texts, ids[part], max_new_tokens, sampling, seeds[part], speed)

    return batches()


def _batch(model, texts, prompts, max_new_tokens, sampling, seeds, speed):
    current = 0  # the text that is being yielded; later ones wait

    def finished_pieces():
        nonlocal current
        while current < len(texts):
            if piece := texts[current].new():
                yield piece
            if texts[current].finish is None:
                return
            yield texts[current].completion()
            current += 1

    steps = decoding.tokens(
        model,
        prompts,
        max_new_tokens,
        sampling,
        seed=seeds,
        ended=lambda: [text.finish is not None for text in texts],
    )
    lengths = [len(prompt) for prompt in prompts]
    for step in _timed(steps, model, texts, lengths, speed):
        for text, token in zip(texts, step, strict=True):
            if text.finish is None:
                text.take(token)
        yield from finished_pieces()
    for text in texts:
        text.close()
    yield from finished_pieces()


def _timed(steps, model, texts, lengths, speed) -> Iterator[list[int]]:
    """The steps as lists, timed. The time that the consumer takes between steps is not counted."""
    start = time.perf_counter()
    for n, step in enumerate(steps):
        step = step.tolist()  # synchronizes
        check_step(step, n + 1)
        if speed is not None and n:
            cached = [length + n for length, t in zip(lengths, texts, strict=True) if not t.finish]
            speed.steps += 1
            speed.tokens += len(cached)
            speed.seconds += time.perf_counter() - start
            speed.bytes += decoding.step_bytes(model, cached)
        yield step
        start = time.perf_counter()


class _Text:
    """A text that grows with every token, and knows whether it has ended."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, stop: Sequence[str]):
        self.prompt, self.eot, self.stop = prompt, tokenizer.eot, stop
        self.decode = tokenizer.decoder()
        self.text, self.held, self.read = "", "", 0
        self.tokens, self.finish = 0, None

    def take(self, token: int) -> None:
        self.tokens += 1
        if token == self.eot:
            self._end("end")
        else:
            self._give(self.decode(token))

    def close(self) -> None:
        if self.finish is None:
            self._end("length")

    def new(self) -> str:
        """The text added since the last call."""
        piece, self.read = self.text[self.read :], len(self.text)
        return piece

    def completion(self) -> Completion:
        return Completion(self.prompt, self.text, self.tokens, self.finish)

    def _end(self, finish: str) -> None:
        self._give(self.decode())
        if self.finish is None:
            self.text, self.finish = self.text + self.held, finish

    def _give(self, piece: str) -> None:
        self.held += piece
        found = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            self.text, self.finish = self.text + self.held[: min(found)], "stop"
            return
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        free = len(self.held) - keep
        self.text, self.held = self.text + self.held[:free], self.held[free:]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper prefix of stop that text ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 500,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the continuation of one prompt, in pieces of whole characters, as it is sampled."""
    sampling = Sampling(temperature, top_k, top_p)
    parts = complete(model, tokenizer, [prompt], max_new_tokens, sampling, seed=seed, stop=stop)
    return (part for part in parts if isinstance(part, str))


def as_text(prompts: Sequence[str], parts: Iterator[str | Completion]) -> Iterator[str]:
    """Formats the output of complete for printing: each prompt with its text, separated by a
    rule."""
    for n, prompt in enumerate(prompts):
        yield ("-" * 40 + "\n" if n else "") + prompt
        for part in parts:
            if isinstance(part, Completion):
                yield "\n"
                break
            yield part


def as_json(prompts: Sequence["str | Refused"], parts: Iterable[str | Completion]) -> Iterator[str]:
    """The completions as lines of JSON, one object per prompt, as soon as each ends. A refused
    prompt gives an object with its error."""
    completions = (part for part in parts if isinstance(part, Completion))
    for prompt in prompts:
        found = asdict(prompt if isinstance(prompt, Refused) else next(completions))
        yield json.dumps(found, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Refused:
    """A prompt that cannot be continued, as far as it can be read, with the error, which names the
    line."""

    prompt: str
    error: str


def read_prompts(path: str, *, strict: bool = True) -> list[str | Refused]:
    """The prompts in a file, one per line; "-" is standard input. A line of a `.jsonl` file is an
    object with the key "prompt".

    Raises InputError, naming file and line, if a line is not UTF-8 or not such an object. With
    strict=False, such a line becomes a Refused instead.
    """
    prompts: list[str | Refused] = []
    for number, line in enumerate(files.lines_of("prompts", path), 1):
        try:
            text = files.decode_line("prompts", path, number, line)
            prompts.append(_prompt(path, number, text) if path.endswith(".jsonl") else text)
        except InputError as e:
            if strict:
                raise
            prompts.append(Refused(line.decode(errors="replace"), str(e)))
    return prompts


def check_prompts(
    path: str, prompts: Sequence[str | Refused], tokenizer: Tokenizer, *, strict: bool = True
) -> list[str | Refused]:
    """The prompts from read_prompts, checked: each is Refused or a text that tokenizer can encode.

    Raises InputError, naming file and line, for the first text that it cannot encode. With
    strict=False, such a prompt becomes a Refused instead.
    """
    checked: list[str | Refused] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            if isinstance(prompt, str):
                tokenizer.encode(prompt)
        except InputError as e:
            error = f"prompts {quoted(path)}, line {number}: {e}"
            if strict:
                raise InputError(error) from e
            prompt = Refused(prompt.encode(errors="replace").decode(), error)
        checked.append(prompt)
    return checked


def _prompt(path: str, number: int, line: str) -> str:
    try:
        prompt = files.parse_json(line)["prompt"]
        if not isinstance(prompt, str):
            raise TypeError(f"got {type(prompt).__name__}")
        return prompt
    except (ValueError, TypeError, KeyError) as e:
        raise InputError(
            f'prompts {quoted(path)}, line {number} must be {{"prompt": TEXT}} '
            f"({type(e).__name__}: {brief(e)})"
        ) from e


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt. An empty prompt becomes the token that precedes a text: the eot, else a
    newline, else id 0."""
    if prompt:
        return tokenizer.encode(prompt).tolist()
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n").tolist()
    except InputError:
        return [0]
