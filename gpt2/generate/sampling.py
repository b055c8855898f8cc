"""Chooses the next token of each sequence from its logits.

    p = softmax((logits - max logits) / temperature)

top_k and top_p restrict p. A uniform number in [0, 1) then selects a token from the cumulative sum
of p. The maximum is subtracted before the division, so no positive temperature overflows. Logits
without a finite maximum allow no choice: see NO_TOKEN and Watch.

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

from ..errors import NonFiniteError, brief

NO_TOKEN = -2  # for a sequence whose logits allow none: one is NaN or +inf, or all are -inf
_COLDEST = 1e-300  # 1 / temperature must be finite; in float32 this is greedy already


@dataclass(frozen=True)
class Sampling:
    """The rule for choosing a token. temperature 0 is greedy. top_k keeps the k likeliest tokens.
    top_p then keeps the fewest likeliest tokens whose probabilities sum to at least p. Raises
    TypeError or ValueError, naming the field, for an invalid value."""

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

        The chosen token is the one at which the cumulative probability passes `uniform`. Tokens are
        in the order of their ids, or likeliest first with top_k or top_p. A row's choice depends
        on that row alone. A logit of -inf bans its token. Raises NonFiniteError if a row has a NaN
        or +inf, or only -inf.
        """
        token = self.choose(logits, uniform)
        check_step(token.tolist(), 1)
        return token

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Like pick, but a row without a choice gives NO_TOKEN, so that nothing synchronizes."""
        if self.temperature == 0.0:
            largest, token = logits.max(dim=-1)  # 16-bit argmax takes 4 times as long on a CPU
            return token.masked_fill_(largest - largest != 0, NO_TOKEN)
        logits, ids = logits.to(torch.promote_types(logits.dtype, torch.float32)), None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True)
        largest = logits.amax(dim=-1, keepdim=True)  # NaN if the row has one
        scaled = (logits.double() - largest) / max(self.temperature, _COLDEST)
        probs = scaled.softmax(dim=-1)
        total = probs.cumsum(dim=-1)
        if self.top_p is not None:
            probs = probs.masked_fill(total - probs >= self.top_p, 0.0)
            total = probs.cumsum(dim=-1)
        # The first token whose total exceeds it; never a token of probability 0
        choice = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)
        choice = choice.clamp_(max=logits.shape[-1] - 1)
        token = choice if ids is None else ids.gather(1, choice)
        return token.masked_fill_(largest - largest != 0, NO_TOKEN)[:, 0]


DEFAULT = Sampling()


def check_step(tokens: Sequence[int], step: int) -> None:
    """Raises NonFiniteError, naming step and sequence, if one has NO_TOKEN."""
    if NO_TOKEN in tokens:
        raise NonFiniteError(
            f"step {step} of sampling can choose no token for sequence {tokens.index(NO_TOKEN)}: "
            f"its logits are not finite"
        )


class Watch:
    """Checks the tokens of each step for NO_TOKEN without synchronizing with a GPU.

    On a CPU, see raises at once. From a GPU, the tokens are copied asynchronously, and an error is
    raised by the first call after the copy has completed: a later see, or finish.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copies: deque = deque()  # (step, tokens being copied to the CPU, event of completion)

    def see(self, tokens: Tensor, step: int) -> None:
        """Checks tokens (B,) of a step. Raises NonFiniteError, naming the step, for this step or an
        earlier one whose copy has completed."""
        if self.device.type != "cuda":
            check_step(tokens.tolist(), step)
            return
        copy, there = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        there.record(torch.cuda.current_stream(self.device))
        self.copies.append((step, copy, there))
        while self.copies and self.copies[0][2].query():
            self._look_at_next()

    def finish(self) -> None:
        """Waits for the tokens of every step, and checks them."""
        while self.copies:
            self.copies[0][2].synchronize()
            self._look_at_next()

    def _look_at_next(self) -> None:
        step, copy, _ = self.copies.popleft()
        check_step(copy.tolist(), step)


class Uniform:
    """Uniform numbers in [0, 1) for each sequence. They depend on its seed alone, not on the device
    or the batch."""

    DRAWN = 256  # numbers drawn at a time

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device, self.drawn, self.used = device, None, self.DRAWN

    def __call__(self) -> Tensor:
        """The next number of each sequence, (B,) float64. It has 24 bits, so its product with a sum
        is always below that sum."""
        if self.used == self.DRAWN:
            drawn = [torch.rand(self.DRAWN, generator=g) for g in self.generators]
            self.drawn, self.used = torch.stack(drawn).double().to(self.device), 0
        self.used += 1
        return self.drawn[:, self.used - 1]


def as_int(name: str, value: object) -> int:
    """value as an int. Raises TypeError, naming it, unless it is an integer of any type except
    bool; numpy's integers and tensors of one integer are accepted."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        got = brief(repr(value))
        raise TypeError(f"{name} must be an integer, got {got}") from None


def seeds_of(prompts: Sequence[Sequence[int]], seed: int | None) -> list[int]:
    """A seed for each prompt: `seed` plus the number of equal prompts before it in the batch.

    So a prompt's text does not depend on the rest of the batch, and equal prompts get different
    texts. None draws a seed from PyTorch's generator. Raises TypeError or ValueError, naming seed,
    for an invalid one.
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
