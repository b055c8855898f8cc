"""How the next token of each sequence is chosen from its logits.

    p = softmax((logits - max logits) / temperature)

cut by top_k and top_p, then a number in [0, 1) picks from the running sum of p. The maximum is
subtracted before the division, so that no positive temperature overflows. Logits without a finite
maximum choose nothing: see NO_TOKEN and Watch.

    B sequences   V vocabulary
"""

import math
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from .errors import NonFiniteError, brief

NO_TOKEN = -2  # of a sequence whose logits choose none: one is NaN or +inf, or all are -inf
_COLDEST = 1e-300  # 1 / temperature must be finite; in float32 this is greedy already


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy; top_k leaves the k likeliest; top_p then the
    likeliest up to the first that brings their sum to p. Raises TypeError or ValueError, naming the
    field."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        for name, kind in (("temperature", Real), ("top_k", Integral), ("top_p", Real)):
            value = getattr(self, name)
            absent = value is None and name != "temperature"
            if not absent and (isinstance(value, bool) or not isinstance(value, kind)):
                expected = "an int" if kind is Integral else "a number"
                raise TypeError(f"{name} must be {expected}, got {value!r}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token id per row: logits (B, V), uniform (B,) in [0, 1), to (B,) int64.

        The token at which the sum of probabilities, likeliest first where they are cut, else in
        the order of ids, passes `uniform`: a row's choice depends on nothing but the row. A logit
        of -inf bans its token. Raises NonFiniteError for a row with NaN, +inf, or -inf alone.
        """
        token = self.choose(logits, uniform)
        check_step(token.tolist(), 1)
        return token

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """pick, but a row that can choose none gives NO_TOKEN: nothing waits for the device."""
        if self.temperature == 0.0:
            largest, token = logits.max(dim=-1)  # argmax of 16 bits: four times as long on a CPU
            return token.masked_fill_(largest - largest != 0, NO_TOKEN)
        logits, ids = logits.to(torch.promote_types(logits.dtype, torch.float32)), None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True)
        largest = logits.amax(dim=-1, keepdim=True)  # NaN where there is one
        scaled = (logits.double() - largest) / max(self.temperature, _COLDEST)
        probs = scaled.softmax(dim=-1)
        total = probs.cumsum(dim=-1)
        if self.top_p is not None:
            probs = probs.masked_fill(total - probs >= self.top_p, 0.0)
            total = probs.cumsum(dim=-1)
        # The first whose total exceeds it, so one of probability 0 never
        choice = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
        choice = choice.clamp_(max=logits.shape[-1] - 1)
        token = choice if ids is None else ids.gather(1, choice)
        return token.masked_fill_(largest - largest != 0, NO_TOKEN)[:, 0]


DEFAULT = Sampling()


def check_step(tokens: Sequence[int], step: int) -> None:
    """Raises NonFiniteError, naming step and sequence, where one has NO_TOKEN."""
    if NO_TOKEN in tokens:
        raise NonFiniteError(
            f"step {step} of sampling can choose no token for sequence {tokens.index(NO_TOKEN)}: "
            f"its logits are not finite"
        )


class Watch:
    """Looks at the tokens of each step for NO_TOKEN, without making a GPU wait.

    On a CPU it raises at once. From a GPU the tokens are copied as they come: whoever has read the
    tokens of a step hears of them with the next, and everybody at the end.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copies: deque = deque()  # (step, tokens on their way to the CPU, when they are there)

    def see(self, tokens: Tensor, step: int) -> None:
        """tokens (B,) of a step. Raises NonFiniteError, naming the step, as soon as it is known."""
        if self.device.type != "cuda":
            check_step(tokens.tolist(), step)
            return
        copy, there = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        there.record(torch.cuda.current_stream(self.device))
        self.copies.append((step, copy, there))
        while self.copies and self.copies[0][2].query():
            self._look_at_next()

    def finish(self) -> None:
        """Waits for the tokens of every step."""
        while self.copies:
            self.copies[0][2].synchronize()
            self._look_at_next()

    def _look_at_next(self) -> None:
        step, copy, _ = self.copies.popleft()
        check_step(copy.tolist(), step)


class Uniform:
    """Numbers in [0, 1) for each sequence, from its own seed alone: on any device, in any batch."""

    DRAWN = 256  # at a time

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device, self.drawn, self.used = device, None, self.DRAWN

    def __call__(self) -> Tensor:
        """The next number of each: (B,) float64, with 24 bits, so that times a sum is below it."""
        if self.used == self.DRAWN:
            drawn = [torch.rand(self.DRAWN, generator=g) for g in self.generators]
            self.drawn, self.used = torch.stack(drawn).double().to(self.device), 0
        self.used += 1
        return self.drawn[:, self.used - 1]


def as_int(name: str, value: object) -> int:
    """An integer of whichever type but bool: numpy's, and tensors of one, too. Raises TypeError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        got = brief(repr(value))
        raise TypeError(f"{name} must be an integer, got {got}") from None


def seeds_of(prompts: Sequence[Sequence[int]], seed: int | None) -> list[int]:
    """A seed for each prompt: `seed`, and one more for each equal prompt before it in the batch.

    So a prompt's text depends on the seed alone, whatever else is in the batch, and several of the
    same prompt differ. None draws one from PyTorch's generator. Raises TypeError and ValueError,
    naming seed.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seed = as_int("seed", seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    before: dict[tuple, int] = {}
    seeds = []
    for prompt in map(tuple, prompts):
        before[prompt] = before.get(prompt, -1) + 1
        seeds.append((seed + before[prompt]) % 2**63)
    return seeds
