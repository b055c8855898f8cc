"""Evaluation: every token is scored once, with the documented context, in any batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from huggingface_models import their_model
from scored_models import BYTES_AND_EOT, SMALL, L, constant_model, log_p
from small_models import model_in

from gpt2.data.tokenizer import char
from gpt2.errors import InputError, NonFiniteError
from gpt2.evaluate import scoring
from gpt2.evaluate.scoring import Window, perplexity, score, score_all, windows
from gpt2.generate.quantize import quantize_int8
from gpt2.model import Model
from gpt2.train.config import TrainConfig
from gpt2.train.start import Trainer

LENGTHS = [2, L, L + 1, L + 2, 2 * L, 2 * L + 1, 2 * L + 2, 3 * L + 5]


pytestmark = pytest.mark.usefixtures("without_the_interpreter")


@pytest.fixture(scope="module")
def model():
    """A model with larger weights than usual, so that wrong scores differ visibly."""
    torch.manual_seed(0)
    model = model_in(SMALL, torch.float64).cpu().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def some_ids(n, V=SMALL.vocab_size):
    return torch.randint(V, (n,)).numpy()


def brute_force(model, ids, context, stride):
    """The sum over all tokens but the first. The context of each starts with its window, the first
    one whose targets include the token."""
    total = 0.0
    for t in range(1, len(ids)):
        first = max(0, -(-(t - context) // stride)) * stride
        total -= log_p(model, ids[first:t], ids[t])
    return total


# ---- windows


@pytest.mark.parametrize("stride", [1, 5, L // 2, L - 1, L])
@pytest.mark.parametrize("n", [0, 1, *LENGTHS])
def test_every_token_once_with_the_context_that_is_promised(n, stride):
    scored = []
    for window in windows(np.arange(n), L, stride):
        assert 2 <= len(window.ids) <= L + 1
        assert 1 <= window.scored < len(window.ids)
        for token in window.ids[-window.scored :].tolist():
            scored.append(token)
            assert token - window.ids[0] >= min(token, L - stride + 1)
    assert scored == list(range(1, n))


def test_windows_by_hand():
    def shown(*args):
        return [(list(w.ids), w.scored) for w in windows(np.arange(6), *args)]

    assert shown(4, 2) == [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5], 1)]
    assert shown(3, 3) == [([0, 1, 2, 3], 3), ([3, 4, 5], 2)]
    assert shown(2, 1) == [([0, 1, 2], 2), ([1, 2, 3], 1), ([2, 3, 4], 1), ([3, 4, 5], 1)]
    assert shown(5, 1) == shown(8, 8) == [([0, 1, 2, 3, 4, 5], 5)]


# ---- perplexity


def test_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8, whatever comes before."""
    model = constant_model([math.log(8), math.log(4), math.log(2), math.log(2)])
    tokenizer = char("abcé")  # é has two bytes
    result = perplexity(model, [3, 0, 0, 1, 2, 3], stride=1, context=3, tokenizer=tokenizer)
    assert (result.tokens, result.bytes) == (5, 6)
    bits = 1 + 1 + 2 + 3 + 3  # the first token is not predicted
    assert result.nats == pytest.approx(bits * math.log(2), rel=1e-6)
    assert result.nats_per_token == pytest.approx(bits / 5 * math.log(2), rel=1e-6)
    assert result.perplexity == pytest.approx(2 ** (bits / 5), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(bits / 6, rel=1e-6)
    assert result.seconds > 0 and result.tokens_per_second == 5 / result.seconds


@pytest.mark.parametrize("context, stride", [(L, 1), (L, 5), (L, L // 2), (L, L), (7, 3), (1, 1)])
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_each_token_by_itself(n, context, stride, model):
    ids = some_ids(n)
    result = perplexity(model, ids, context=context, stride=stride, batch_size=3)
    assert result.tokens == n - 1
    assert result.nats == pytest.approx(brute_force(model, ids, context, stride), rel=1e-12)


def test_half_of_the_context_is_the_default(model):
    ids = some_ids(3 * L)
    result = perplexity(model, ids)
    assert (result.context, result.stride) == (L, L // 2)
    assert result.nats == perplexity(model, ids, context=L, stride=L // 2).nats
    assert perplexity(model, ids, context=7).stride == 4
    assert perplexity(model, ids, context=1).stride == 1


@pytest.mark.parametrize("stride", [4, 9, 10])
def test_equals_the_loop_of_transformers_documentation(stride, tmp_path):
    """Equals the sum over tokens of that loop. (Its average weights all windows but the first by
    one token less than their loss has.) Its max_length counts the last token."""
    theirs = their_model(SMALL).double().eval()
    theirs.save_pretrained(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        ours = Model.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    max_length, ids = 11, some_ids(50)
    encoded = torch.from_numpy(ids)[None]
    nats, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        inputs = encoded[:, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = theirs(inputs, labels=labels).loss
        n = int((labels[:, 1:] != -100).sum())
        nats, count, previous = nats + loss.item() * n, count + n, end
        if end == len(ids):
            break
    result = perplexity(ours, ids, context=max_length - 1, stride=stride)
    assert count == result.tokens == 49
    assert result.nats == pytest.approx(nats, rel=1e-6)  # transformers' losses are float32


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_the_batch_changes_nothing(fast, model):
    """In float32, where products may round differently in a batch; the kernels do not."""
    small = model_in(SMALL, fast=fast)
    small.load_state_dict(model.state_dict())
    ids = some_ids(10 * L + 3)
    exact = perplexity(model, ids, stride=3)
    results = [perplexity(small, ids, stride=3, batch_size=b) for b in (1, 2, 7, 1000)]
    for result in results:
        assert result.tokens == exact.tokens
        assert result.nats == pytest.approx(exact.nats, rel=1e-6)


def test_sums_are_float64(monkeypatch):
    """1 + 2^-30 summed in float32 would be 1."""
    model = constant_model([0.0] * 4)
    losses = iter([1.0, 2.0**-30])

    def fixed(model, windows, batch_size):
        for _ in windows:
            yield scoring.Scores(torch.tensor([next(losses)]).double(), torch.tensor([True]))

    monkeypatch.setattr(scoring, "score", fixed)
    assert perplexity(model, [0, 1], [0, 1]).nats == 1 + 2.0**-30
    monkeypatch.undo()
    (scores,) = score(model, [Window([0, 1], 1)], 1)
    assert scores.losses.dtype == torch.float64


def test_logits_never_exist_for_all_tokens(model, monkeypatch):
    sizes, logits_of = [], Model.logits_of

    def noted(self, h):
        sizes.append(h.shape)
        return logits_of(self, h)

    ids = some_ids(4 * L + 1)
    whole = perplexity(model, ids, batch_size=4).nats
    monkeypatch.setattr(scoring, "ROWS", 7)
    monkeypatch.setattr(Model, "logits_of", noted)
    assert perplexity(model, ids, batch_size=4).nats == pytest.approx(whole, rel=1e-12)
    assert max(shape[0] for shape in sizes) == 7
    assert sum(shape[0] for shape in sizes) == 4 * L, "the head sees what is scored, and no more"


def test_no_window_crosses_from_one_text_to_another(model):
    first, second = some_ids(L + 3), some_ids(L + 3)
    both = perplexity(model, first, some_ids(1), second, batch_size=5)
    apart = [perplexity(model, ids) for ids in (first, second)]
    assert both.tokens == sum(result.tokens for result in apart)
    assert both.nats == pytest.approx(sum(result.nats for result in apart), rel=1e-12)


def test_dropout_is_off_meanwhile_and_back_afterwards():
    torch.manual_seed(0)
    model = Model(dataclasses.replace(SMALL, dropout=0.5)).train()
    ids = some_ids(40)
    results = {perplexity(model, ids).nats for _ in range(3)}
    assert len(results) == 1 and model.training
    assert results == {perplexity(model.eval(), ids).nats} and not model.training


def test_the_cost_of_int8(model):
    """The figures of `gpt2 eval --quantize int8` are close to those of the whole weights, but not
    equal."""
    small = model_in(SMALL, fast=True)
    small.load_state_dict(model.state_dict())
    ids = some_ids(100)
    whole = perplexity(small, ids)
    rounded = perplexity(quantize_int8(small), ids)
    assert rounded.nats != whole.nats
    assert rounded.nats_per_token == pytest.approx(whole.nats_per_token, rel=0.02)


def test_bfloat16_is_summed_in_float32(model):
    small = model_in(SMALL).cpu()
    small.load_state_dict(model.state_dict())
    ids = some_ids(100)
    result = perplexity(small.bfloat16(), ids)
    assert result.nats == pytest.approx(perplexity(model, ids).nats, rel=0.01)
    (scores,) = score(small, [Window(ids[:L], L - 1)], 1)
    bfloat16 = scores.losses.bfloat16().double()
    assert (scores.losses != bfloat16).any(), "the softmax itself is at least float32"


def test_eot_has_no_bytes_but_its_loss_counts(model):
    ids = [*b"ab", 256, *b"c"]
    result = perplexity(model, ids, tokenizer=BYTES_AND_EOT)
    assert (result.tokens, result.bytes) == (3, 2)
    assert result.nats == pytest.approx(brute_force(model, ids, L, L // 2), rel=1e-12)
    assert perplexity(model, ids).bits_per_byte is None
    assert perplexity(model, [0, 256], tokenizer=BYTES_AND_EOT).bits_per_byte is None


def test_the_validation_loss_of_training_is_the_one_of_disjoint_windows(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40)
    (tmp_path / "b.txt").write_text("and the dog on the cat! " * 40)
    options = TrainConfig(
        data=str(tmp_path), out=str(tmp_path), block_size=L, n_layer=1, n_head=1, n_embd=16,
        batch_size=3, device="cpu", dtype="float32",
    )  # fmt: skip
    trainer = Trainer(options)
    ids = trainer.corpus.val.parts[0]
    result = perplexity(trainer.model, ids, stride=L)
    assert result.nats_per_token == pytest.approx(trainer.evaluate(), rel=1e-6)


def test_progress_hears_of_every_token(model):
    heard = []
    perplexity(model, some_ids(50), progress=heard.append)
    assert sum(heard) == 49 and len(heard) > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"context": L + 1}, "context must be 1 to block_size 16, got 17"),
        ({"context": 0}, "context must be 1 to block_size 16, got 0"),
        ({"context": 8, "stride": 9}, "stride must be 1 to context 8, got 9"),
        ({"stride": 0}, "stride must be 1 to context 16, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message, model):
    with pytest.raises(InputError, match=message):
        perplexity(model, some_ids(50), **arguments)


@pytest.mark.parametrize("texts", [[], [[]], [[5]], [[5], [6]]])
def test_without_a_second_token_there_is_nothing_to_score(texts, model):
    with pytest.raises(InputError, match=f"at least 2 tokens.*got {sum(map(len, texts))}"):
        perplexity(model, *texts)


@pytest.mark.parametrize("ids, scored", [([1], 1), ([1] * (L + 2), 1), ([1, 2], 2), ([1, 2], 0)])
def test_a_window_that_does_not_fit_is_named(ids, scored, model):
    with pytest.raises(ValueError, match="a window must hold 2 to block_size"):
        list(score(model, [Window(ids, scored)], 1))


def test_a_loss_that_is_not_finite_is_said():
    model = constant_model([0.0, float("nan")])
    with pytest.raises(NonFiniteError, match="the loss over 2 tokens is nan"):
        perplexity(model, [0, 1, 0])


def test_perplexity_beyond_a_float_is_infinite():
    assert perplexity(constant_model([1e4, 0.0]), [0, 1]).perplexity == math.inf


# ---- scores


def test_scores_in_any_batch_and_order(model):
    """Padding, and the choice of windows in a batch, change nothing."""
    given = [Window(some_ids(n), s) for n, s in [(3, 1), (17, 16), (2, 1), (9, 4), (12, 11)]]
    alone = [next(score(model, [window], 1)) for window in given]
    for batch_size in (1, 2, 5):
        for scorer in (score, score_all):
            for found, want in zip(scorer(model, given, batch_size), alone, strict=True):
                assert torch.allclose(found.losses, want.losses, rtol=1e-12, atol=0)
                assert torch.equal(found.greedy, want.greedy)
    for window, scores in zip(given, alone, strict=True):
        for i, loss in enumerate(scores.losses.tolist()):
            t = len(window.ids) - window.scored + i
            assert loss == pytest.approx(-log_p(model, window.ids[:t], window.ids[t]), rel=1e-12)


def test_greedy_is_the_likeliest_token(model):
    ids = [7]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    other = (ids[4] + 1) % SMALL.vocab_size
    (all_greedy, one_not) = score(model, [Window(ids, 6), Window([*ids[:4], other], 4)], 2)
    assert all_greedy.greedy.tolist() == [True] * 6
    assert one_not.greedy.tolist() == [True] * 3 + [False]
