"""Choosing a token: at every temperature, and never from logits that are not finite."""

import math

import pytest
import torch
from small_models import ids, model_in

from gpt2 import Config
from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.data.tokenizer import byte
from gpt2.errors import NonFiniteError
from gpt2.generate import completion, decoding
from gpt2.generate.sampling import NO_TOKEN, Sampling, Watch

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

WAYS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "cold": {"temperature": 1e-39},
    "top-k": {"top_k": 3},
    "top-k-of-all": {"top_k": 99},
    "top-p": {"top_p": 0.9},
    "both": {"top_k": 3, "top_p": 0.9},
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALF = torch.full((1,), 0.5).double()


def half(B):
    return HALF.expand(B)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-39, 1e-30, 1e-6])
def test_the_coldest_temperatures_are_greedy(temperature, dtype):
    """Dividing by 1e-39 first overflowed: the first token was chosen, or none."""
    logits = torch.randn(64, 100, dtype=torch.float64).to(dtype)
    logits.scatter_(1, torch.randint(100, (64, 1)), 5.0)  # no ties
    if dtype != torch.float16:
        logits[32:] *= 1e30
    greedy = Sampling(0.0).pick(logits, half(64))
    for cuts in ({}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5}):
        assert torch.equal(Sampling(temperature, **cuts).pick(logits, half(64)), greedy)


def test_the_hottest_temperature_is_uniform():
    logits = torch.tensor([[3e38, -3e38, 0.0, -math.inf]]).expand(30000, -1)
    uniform = torch.rand(30000, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.bincount(Sampling(1e60).pick(logits, uniform), minlength=4) / 30000
    assert counts.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_logits_that_are_not_finite_choose_no_token(how, dtype):
    good, banned = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, -math.inf, 2.0, -math.inf, 4.0]
    way = Sampling(**how)
    assert way.pick(torch.tensor([good, banned], dtype=dtype), half(2)).min() >= 0
    lone = torch.full((1, 5), -math.inf, dtype=dtype)
    lone[0, 3] = 1.0
    assert way.pick(lone, half(1)).tolist() == [3], "all others are banned"
    for spoilt in ([0, math.nan, 2, 3, 4], [0, 1, 2, 3, math.inf], [-math.inf] * 5, [math.nan] * 5):
        logits = torch.tensor([good, spoilt, good], dtype=dtype)
        chosen = way.choose(logits, half(3)).tolist()
        assert chosen[1] == NO_TOKEN and chosen[0] == chosen[2] >= 0
        with pytest.raises(NonFiniteError, match="no token for sequence 1: its logits are not fin"):
            way.pick(logits, half(3))


def spoilt_after(model, steps):
    """The model, with NaN logits for the last sequence after this many steps."""
    logits_of, calls = model.logits_of, []

    def spoilt(h):
        calls.append(h)
        logits = logits_of(h)
        if len(calls) > steps:
            logits[-1, 1] = math.nan
        return logits

    model.logits_of = spoilt
    return model


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_generation_stops_at_the_step_that_is_not_finite(how, fast):
    """From NaN the last token was sampled, without end."""
    arguments = {"temperature": 1.0, **how, "seed": 1}
    message = "step 3 of sampling can choose no token for sequence 1"
    model = spoilt_after(model_in(fast=fast), 2)
    with pytest.raises(NonFiniteError, match=message):
        model.generate(ids(2, 5), 6, **arguments)
    assert model.training, "left as it was"
    seen = []
    with pytest.raises(NonFiniteError, match=message):
        for token in spoilt_after(model_in(fast=fast), 2).stream(ids(2, 5), 6, **arguments):
            seen.append(token)
    assert len(seen) == 2 and all((token >= 0).all() for token in seen)


def test_a_sequence_that_has_ended_is_not_looked_at():
    model = model_in(fast=True)
    first = [int(t) for t in next(decoding.tokens(model, [[1], [2]], 1, Sampling(0.0)))]
    assert first[0] != first[1]
    steps = decoding.tokens(spoilt_after(model, 1), [[1], [2]], 4, Sampling(0.0), stop=[first[1]])
    assert len(list(steps)) == 4


class Copied:
    """Tokens on a GPU, as Watch sees them: the copy arrives when the test says so."""

    def __init__(self, tokens):
        self.tokens = tokens

    def to(self, device, non_blocking):
        assert device == "cpu" and non_blocking
        return torch.tensor(self.tokens)

    def tolist(self):
        pytest.fail("waits for the device")


@pytest.fixture
def events(monkeypatch):
    class Event:
        there, waited = False, 0

        def record(self, stream):
            made.append(self)

        def query(self):
            return self.there

        def synchronize(self):
            self.waited += 1

    made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


def test_a_gpu_is_not_waited_for_but_at_the_end(events):
    watch = Watch(torch.device("cuda"))
    for step in range(1, 4):
        watch.see(Copied([7, NO_TOKEN if step == 2 else 7]), step)
    assert not any(event.waited for event in events)
    with pytest.raises(NonFiniteError, match=r"step 2 of sampling .* sequence 1"):
        watch.finish()
    assert [event.waited for event in events] == [1, 1, 0]


def test_who_has_read_a_step_hears_of_it_with_the_next(events):
    watch = Watch(torch.device("cuda"))
    watch.see(Copied([NO_TOKEN, 7]), 1)
    events[0].there = True
    with pytest.raises(NonFiniteError, match=r"step 1 of sampling .* sequence 0"):
        watch.see(Copied([7, 7]), 2)
    assert not any(event.waited for event in events)


def test_a_step_on_a_gpu_reads_nothing():
    """Choosing a token must not read a number from the device, which would make the step wait."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func), "waits for the device"
            return func(*args, **(kwargs or {}))

    logits = torch.randn(2, 20)
    with Reads():
        for how in WAYS.values():
            Sampling(**how).choose(logits, half(2))


def test_text_is_not_written_from_a_token_that_was_not_chosen(monkeypatch):
    """On a GPU the tokens arrive before it is known that they are invalid."""
    monkeypatch.setattr(
        decoding, "tokens", lambda *args, **kwargs: iter([torch.tensor([97]), torch.tensor([-2])])
    )
    monkeypatch.setattr(decoding, "check_batch", lambda *args: None)
    parts = completion.complete(None, byte(), ["x"], 9)
    assert next(parts) == "a"
    with pytest.raises(NonFiniteError, match="step 2 of sampling"):
        next(parts)


@pytest.mark.parametrize("flags", [[], ["--no-fast"], ["--temperature", "0"], ["--top-p", "0.5"]])
def test_a_broken_model_samples_nothing(flags, tmp_path, capsys):
    config = Config(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    model = model_in(config).cpu()
    with torch.no_grad():
        model.transformer["ln_f"].bias.fill_(math.nan)
    checkpoint.write(tmp_path / checkpoint.FILE, config, model.to_state(), step=0)
    (tmp_path / "tokenizer.json").write_text(byte().to_json())
    assert main(["sample", str(tmp_path), "--prompt", "a", *flags]) == 1
    printed = capsys.readouterr()
    assert printed.out == "a\n"
    assert printed.err.splitlines()[-1] == (
        "gpt2: error: step 1 of sampling can choose no token for sequence 0: "
        "its logits are not finite"
    )
