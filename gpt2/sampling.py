"""Text from a model: what follows each of some prompts, as it is sampled.

Prompts are continued in batches, a token of each at a time. A text ends at max_new_tokens, with the
document (`<|endoftext|>`), or before a stop string; what may be the beginning of one is held back
until it is known.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from . import files, generation
from .errors import InputError, brief
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
        a_step = f"{1e3 * self.seconds / self.steps:.3g} ms a step"
        return f"{self.tokens:,} tokens, {self.tokens / self.seconds:,.1f} tokens/s, {a_step}"


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
    InputError for a prompt that the tokenizer cannot encode and for an empty stop string, before
    anything is sampled.
    """
    if not all(stop):
        raise InputError("stop must be strings of at least one character, got an empty one")
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    seeds = generation.seeds_of(ids, seed)

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


def as_json(parts: Iterable[str | Completion]) -> Iterator[str]:
    """The completions, an object in JSON a line, as each ends."""
    for part in parts:
        if isinstance(part, Completion):
            yield json.dumps(asdict(part), ensure_ascii=False) + "\n"


def read_prompts(path: str) -> list[str]:
    """A prompt a line; of a `.jsonl` file the "prompt" of each line's object; - is standard input.

    Raises InputError, naming file and line, for what is neither UTF-8 nor such an object.
    """
    lines = files.read_lines("prompts", path)
    if not path.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = files.parse_json(line)["prompt"]
            if not isinstance(prompt, str):
                raise TypeError(f"got {type(prompt).__name__}")
        except (ValueError, TypeError, KeyError) as e:
            raise InputError(
                f'prompts {path!r}, line {number} must be {{"prompt": TEXT}} '
                f"({type(e).__name__}: {brief(e)})"
            ) from e
        prompts.append(prompt)
    return prompts


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
