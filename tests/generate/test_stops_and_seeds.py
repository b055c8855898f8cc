"""What sampled tokens depend on, when rows stop, and which arguments are refused."""

import math

import pytest
import torch
from small_models import model_in
from util import bits_equal

from gpt2.generate import decoding
from gpt2.generate.decoding import Sampling, Uniform, seeds_of

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def texts(model, prompts, n, sampling=GREEDY, **kwargs):
    """The continuation of each prompt, as lists without the -1 after a stop."""
    steps = [t.tolist() for t in decoding.tokens(model, prompts, n, sampling, **kwargs)]
    return [[t for t in row if t >= 0] for row in zip(*steps, strict=True)]


@pytest.mark.usefixtures("without_the_interpreter")
def test_a_text_depends_on_its_prompt_and_seed_alone():
    model = model_in(fast=True)
    hot = Sampling(temperature=2.0, top_k=50)
    together = texts(model, [*PROMPTS, PROMPTS[0]], 20, hot, seed=5)
    for prompt, text in zip(PROMPTS, together, strict=False):
        assert texts(model, [prompt], 20, hot, seed=5) == [text]
    assert together[3] != together[0], "equal prompts differ"
    assert texts(model, [PROMPTS[0]], 20, hot, seed=6) == [together[3]]
    assert texts(model, [PROMPTS[0]], 20, hot) != texts(model, [PROMPTS[0]], 20, hot)
    torch.manual_seed(0)
    first = texts(model, PROMPTS, 20, hot)
    torch.manual_seed(0)
    assert texts(model, PROMPTS, 20, hot) == first


@pytest.mark.usefixtures("without_the_interpreter")
def test_stop_ends_a_row_and_then_the_stream():
    model = model_in(fast=True)
    free = texts(model, PROMPTS, 30)
    stop = {free[0][4], free[1][9]}
    want = [row[: min((row.index(s) for s in stop if s in row), default=29) + 1] for row in free]
    assert texts(model, PROMPTS, 30, stop=stop) == want
    steps = list(decoding.tokens(model, PROMPTS, 30, GREEDY, stop=stop))
    assert len(steps) == max(map(len, want))
    assert list(decoding.tokens(model, PROMPTS, 0, GREEDY)) == []


def test_sampling_cuts():
    """top_k and top_p against their definitions, from the frequencies of many samples."""
    logits = torch.tensor([0.25, 0.5, 0.1, 0.15]).log().expand(20000, -1)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0)).double()

    def frequencies(**cuts):
        tokens = Sampling(**cuts).pick(logits, uniform)
        return (torch.bincount(tokens, minlength=4) / len(tokens)).tolist()

    def near(p):
        return pytest.approx(p, abs=0.02)

    assert frequencies() == near([0.25, 0.5, 0.1, 0.15])
    assert frequencies(top_k=2) == near([1 / 3, 2 / 3, 0, 0])
    assert frequencies(top_k=9) == near([0.25, 0.5, 0.1, 0.15])
    assert frequencies(top_p=0.5) == near([0, 1, 0, 0])
    assert frequencies(top_p=0.6) == near([1 / 3, 2 / 3, 0, 0])
    assert frequencies(top_p=1e-9) == near([0, 1, 0, 0])
    assert frequencies(top_k=2, top_p=0.7) == near([1 / 3, 2 / 3, 0, 0])
    assert frequencies(temperature=0.5) == near([0.181, 0.725, 0.029, 0.065])
    assert frequencies(temperature=0.0) == [0, 1, 0, 0]
    equal = torch.zeros(20000, 2)
    assert Sampling(top_p=0.5).pick(equal, uniform).unique().numel() == 1, "half is enough"
    uncut, whole = (how.pick(logits, uniform) for how in (Sampling(), Sampling(top_k=4)))
    assert torch.equal(uncut, whole), "what leaves all tokens changes no choice"


def test_the_ends_of_the_unit_interval():
    """0 chooses the first token with any probability, the largest number below 1 the last."""
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf], [0.0] * 4])
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=1.0)):
        low = sampling.pick(logits, torch.zeros(2).double())
        high = sampling.pick(logits, torch.full((2,), 1 - 2.0**-24).double())
        assert low[0] in (1, 2) and high[0] in (1, 2) and low[0] != high[0]
    assert Sampling().pick(logits, torch.zeros(2).double()).tolist() == [1, 0]


def test_each_row_has_numbers_of_its_own():
    draws = torch.stack(
        [u() for u in [Uniform([3, 4, 3], torch.device("cpu"))] for _ in range(600)]
    )
    assert bits_equal(draws[:, 0], draws[:, 2]) and not bits_equal(draws[:, 0], draws[:, 1])
    assert draws.min() >= 0 and draws.max() < 1 and draws[:, 0].unique().numel() > 590
    assert seeds_of([[1], [2], [1], [1]], 7) == [7, 7, 8, 9]
    assert seeds_of([[1], [1]], 2**63 - 1) == [2**63 - 1, 0]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"idx": torch.zeros(1, 0).long()}, "T >= 1"),
        ({"idx": torch.tensor([[65]])}, "prompts must hold ids from 0 to 64, got 65"),
        ({"seed": -1}, "seed must be at least 0 and below"),
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
        ({"idx": torch.tensor([[0, 65]])}, "prompts must hold ids from 0 to 64, got 65"),
        ({"idx": torch.tensor([[-1, 0]])}, "prompts must hold ids from 0 to 64, got -1"),
    ],
)
def test_bad_sampling_arguments_are_named(kwargs, message):
    kwargs = {"idx": torch.zeros(1, 1).long(), "max_new_tokens": 1, **kwargs}
    with pytest.raises(ValueError, match=message):
        model_in().generate(**kwargs)


def test_empty_prompts_are_named():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts must be lists of at least one token"):
            decoding.tokens(model_in(), prompts, 1)
