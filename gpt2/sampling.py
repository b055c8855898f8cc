"""Text from a model: what follows each of some prompts, as it is sampled.

Prompts are continued in batches, a token of each at a time. A text ends at max_new_tokens, with the
document (`<|endoftext|>`), or before a stop string; what may be the beginning of one is held back
until it is known.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from . import bars, files, generation, picking
from .errors import InputError, brief, quoted
from .generation import Sampling
from .model import Model
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """A prompt and what followed it."""

    prompt: str
    text: str
    tokens: int  # sampled, the one that ended it included
    finish: str  # length, end (of the document) or stop (a stop string)


@dataclass
class Speed:
    """Steps of decoding, the first of each batch left out: it reads the prompts."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0  # that these steps must have read

    def __str__(self) -> str:
        rate = bars.per_second(self.tokens, self.seconds)
        a_step = f"{1e3 * self.seconds / self.steps:.3g} ms a step"
        return f"{self.tokens:,} tokens, {bars.shown(rate, ',.1f')} tokens/s, {a_step}"


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = generation.DEFAULT,
    *,
    seed: int | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    speed: Speed | None = None,
) -> Iterator[str | Completion]:
    """What follows each prompt, in order: pieces of whole characters as they are sampled, then the
    Completion.

    The text after a prompt depends on it and the seed alone (generation.tokens says how far); equal
    prompts differ. An empty prompt starts a document. speed hears of each batch's steps. Raises
    InputError for a prompt that the tokenizer cannot encode, for an empty stop string and for more
    texts at a time than fit into memory, before anything is sampled, and NonFiniteError, naming the
    step, for logits that choose no token.
    """
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{name} must be a list of strings, got {brief(repr(texts))}")
    if picking.as_int("batch_size", batch_size) < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not all(stop):
        raise InputError("stop must be strings of at least one character, got an empty one")
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    seeds = generation.seeds_of(ids, seed)
    if ids:
        lengths = sorted(map(len, ids))[-batch_size:]
        generation.check_batch(model, lengths, max_new_tokens)

    def batches():
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            texts = [_Text(prompt, tokenizer, stop) for prompt in prompts[part]]
            yield from _batch(model, texts, ids[part], max_new_tokens, sampling, seeds[part], speed)

    return batches()


def _batch(model, texts, prompts, max_new_tokens, sampling, seeds, speed):
    front = 0  # the text that is being written; those after it wait

    def written():
        nonlocal front
        while front < len(texts):
            if piece := texts[front].new():
                yield piece
            if texts[front].finish is None:
                return
            yield texts[front].completion()
            front += 1

    steps = generation.tokens(
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
        yield from written()
    for text in texts:
        text.close()
    yield from written()


def _timed(steps, model, texts, lengths, speed) -> Iterator[list[int]]:
    """The steps as lists. The time between them, in which others write, does not count."""
    start = time.perf_counter()
    for n, step in enumerate(steps):
        step = step.tolist()  # waits for the device
        picking.check_step(step, n + 1)
        if speed is not None and n:
            seen = [length + n for length, t in zip(lengths, texts, strict=True) if not t.finish]
            speed.steps += 1
            speed.tokens += len(seen)
            speed.seconds += time.perf_counter() - start
            speed.bytes += generation.step_bytes(model, seen)
        yield step
        start = time.perf_counter()


class _Text:
    """A text as its ids come."""

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
        """What has come since the last call."""
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
    """The length of the longest beginning of stop, but not all of it, that text ends with."""
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
    """What follows one prompt, in pieces of whole characters, as the model samples it."""
    sampling = Sampling(temperature, top_k, top_p)
    parts = complete(model, tokenizer, [prompt], max_new_tokens, sampling, seed=seed, stop=stop)
    return (part for part in parts if isinstance(part, str))


def as_text(prompts: Sequence[str], parts: Iterator[str | Completion]) -> Iterator[str]:
    """What complete gives of these prompts, to be printed: each with its text, a rule between."""
    for n, prompt in enumerate(prompts):
        yield ("-" * 40 + "\n" if n else "") + prompt
        for part in parts:
            if isinstance(part, Completion):
                yield "\n"
                break
            yield part


def as_json(prompts: Sequence["str | Refused"], parts: Iterable[str | Completion]) -> Iterator[str]:
    """The completions of these prompts, an object in JSON a line, as each ends; of a prompt that
    was refused, an object with its error."""
    completions = (part for part in parts if isinstance(part, Completion))
    for prompt in prompts:
        found = asdict(prompt if isinstance(prompt, Refused) else next(completions))
        yield json.dumps(found, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Refused:
    """A prompt that cannot be continued, as far as it can be read, and why: it names its line."""

    prompt: str
    error: str


def read_prompts(path: str, *, strict: bool = True) -> list[str | Refused]:
    """A prompt a line; of a `.jsonl` file the "prompt" of each line's object; - is standard input.

    Raises InputError, naming file and line, for what is neither UTF-8 nor such an object; unless
    strict, such a line is Refused, and the others are read.
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
    """The prompts of read_prompts, each a text that the tokenizer can encode or Refused.

    Raises InputError, naming file and line, for the first that it cannot; unless strict."""
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
    """Its ids; of an empty one what stands before a text: the end of another, else a new line,
    else any first token."""
    if prompt:
        return tokenizer.encode(prompt).tolist()
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n").tolist()
    except InputError:
        return [0]
