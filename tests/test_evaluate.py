"""Evaluation: every token once, with the context that is promised, whatever the batch."""

import dataclasses
import io
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_interop import their_model
from test_model import model_in

from gpt2 import Config, checkpoint, choices, data, evaluate, sampling, shards, weights
from gpt2.cli import main
from gpt2.errors import InputError, NonFiniteError
from gpt2.evaluate import Window, perplexity, score, score_all, windows
from gpt2.model import Model
from gpt2.quantize import quantize_int8
from gpt2.tokenizer import bpe, byte, char, gpt2
from gpt2.train import Trainer
from gpt2.train_config import TrainConfig

L = 16  # block_size
SMALL = Config(block_size=L, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
BYTES_AND_EOT = bpe([bytes([b]) for b in range(256)])
LENGTHS = [2, L, L + 1, L + 2, 2 * L, 2 * L + 1, 2 * L + 2, 3 * L + 5]


pytestmark = pytest.mark.usefixtures("without_the_interpreter")


@pytest.fixture(scope="module")
def model():
    """Larger weights than usual: what is scored wrongly is seen."""
    torch.manual_seed(0)
    model = model_in(SMALL, torch.float64).cpu().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def some_ids(n, V=SMALL.vocab_size):
    return torch.randint(V, (n,)).numpy()


def log_p(model, past, token):
    """One prediction by a run of its own, over what may be seen and nothing else."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([list(map(int, past))]))
    return logits[0, -1].double().log_softmax(-1)[int(token)].item()


def brute_force(model, ids, context, stride):
    """The sum over all tokens but the first, each from as far back as its window begins: that is
    the first window whose targets reach it."""
    total = 0.0
    for t in range(1, len(ids)):
        first = max(0, -(-(t - context) // stride)) * stride
        total -= log_p(model, ids[first:t], ids[t])
    return total


def constant_model(logits):
    """A model that answers with these logits whatever it reads: the last norm gives its bias."""
    V = len(logits)
    model = Model(Config(block_size=8, vocab_size=V, n_layer=1, n_head=1, n_embd=V)).eval()
    with torch.no_grad():
        model.transformer["wte"].weight.copy_(torch.eye(V))
        model.transformer["ln_f"].weight.zero_()
        model.transformer["ln_f"].bias.copy_(torch.tensor(logits))
    return model


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
    """p = 1/2, 1/4, 1/8, 1/8 whatever comes before."""
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
    """Its sum over tokens, that is. (Its average weighs a window by one token less than its loss is
    the mean of, in all windows but the first.) Its max_length counts the last token."""
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
    assert result.nats == pytest.approx(nats, rel=1e-6)  # their losses are float32


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_the_batch_changes_nothing(fast, model):
    """In float32, where products may round otherwise in a batch; kernels do not."""
    small = model_in(SMALL, fast=fast)
    small.load_state_dict(model.state_dict())
    ids = some_ids(10 * L + 3)
    exact = perplexity(model, ids, stride=3)
    results = [perplexity(small, ids, stride=3, batch_size=b) for b in (1, 2, 7, 1000)]
    for result in results:
        assert result.tokens == exact.tokens
        assert result.nats == pytest.approx(exact.nats, rel=1e-6)


def test_sums_are_float64(monkeypatch):
    """1 + 2^-30, added up in float32, would be 1."""
    model = constant_model([0.0] * 4)
    losses = iter([1.0, 2.0**-30])

    def fixed(model, windows, batch_size):
        for _ in windows:
            yield evaluate.Scores(torch.tensor([next(losses)]).double(), torch.tensor([True]))

    monkeypatch.setattr(evaluate, "score", fixed)
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
    monkeypatch.setattr(evaluate, "ROWS", 7)
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
    """What `gpt2 eval --quantize int8` says: close to the whole weights, and not the same."""
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
    """Padding, and which windows share a batch, change nothing."""
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


# ---- multiple choice


QUESTIONS = [
    {"ctx": "A man sits.", "endings": ["He stands up.", "é"], "label": 0, "ctx_a": "A man sits."},
    {"ctx": "Two", "endings": ["three", "four five six", "seven", "eight"], "label": "2"},
    {"ctx": "A context that is far too long", "endings": ["x", "yes", "\u2028no"], "label": 1},
    {"ctx": "", "endings": ["start", "begin"], "label": "1"},
]


@pytest.fixture
def questions_file(tmp_path):
    """A question a line, an empty one among them; U+2028 as it is."""
    lines = [json.dumps(q, ensure_ascii=False) for q in QUESTIONS]
    path = tmp_path / "choices.jsonl"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def right_by_brute_force(model, block_size):
    """Of QUESTIONS: acc, acc_norm, acc_token and how many contexts were cut."""
    right, cut = np.zeros(3), 0
    for question in QUESTIONS:
        prompt = list(question["ctx"].encode()) or [256]
        scores = []
        for ending in question["endings"]:
            ids = list(f" {ending}".encode())
            seen = (prompt + ids)[-(block_size + 1) :]
            start = len(seen) - len(ids)
            total = sum(log_p(model, seen[:t], seen[t]) for t in range(start, len(seen)))
            scores.append((total, total / len(ending), total / len(ids)))
        cut += any(len(prompt) + 1 + len(e.encode()) > block_size + 1 for e in question["endings"])
        right += np.argmax(scores, axis=0) == int(question["label"])
    return [*(right / len(QUESTIONS)), cut]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_choices_equal_each_token_by_itself(seed, batch_size, questions_file):
    torch.manual_seed(seed)
    model = model_in(SMALL, torch.float64).cpu().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + seed)
    questions = choices.read(questions_file, BYTES_AND_EOT, L)
    heard = []
    result = choices.evaluate(model, questions, batch_size, heard.append)
    want = right_by_brute_force(model, L)
    assert [result.acc, result.acc_norm, result.acc_token, result.cut] == want
    assert result.questions == 4 and sum(heard) == 11


def test_choices_by_hand(tmp_path):
    """a is likelier than b, and b than c; an ending's space costs all the same."""
    model = constant_model([0.0, 3.0, 2.0, 1.0])
    tokenizer = char(" abc")
    space, _, b, c = torch.tensor([0.0, 3.0, 2.0, 1.0]).log_softmax(0).tolist()

    def result(*questions):
        path = tmp_path / "q.jsonl"
        path.write_text("\n".join(json.dumps(q) for q in questions))
        return choices.evaluate(model, choices.read(path, tokenizer, 8))

    def question(label, *endings):
        return {"ctx": "a", "endings": list(endings), "label": label}

    both = result(question(0, "a", "b"), question(1, "a", "b"))
    assert (both.acc, both.acc_norm, both.acc_token, both.questions) == (0.5, 0.5, 0.5, 2)
    assert both.error(0.5) == pytest.approx(0.5)  # sqrt(0.5 * 0.5 / (2 - 1))
    assert result(question(0, "b", "b")).acc == 1, "of equals the first"
    assert result(question(0, "b", "b")).error(1.0) is None
    # log p is -3.4 of a space, -1.4 of b, -2.4 of c. A second b costs less than what it divides by
    longer = result(question(1, "b", "bb"))
    assert (longer.acc, longer.acc_norm, longer.acc_token) == (0, 1, 1)
    # -4.9 and -8.3: of characters 1 and 2, the space does not count, of tokens 2 and 3
    assert (space + 2 * c) / 2 > space + b and (space + 2 * c) / 3 < (space + b) / 2
    longer = result(question(1, "b", "cc"))
    assert (longer.acc, longer.acc_norm, longer.acc_token) == (0, 1, 0)


def test_a_byte_and_a_character_are_not_the_same(tmp_path):
    """acc_norm counts characters: é is one, of two bytes."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "a", "endings": ["é", "ab"], "label": 0}))
    (question,) = choices.read(path, byte(), 8)
    assert question.characters == [1, 2]
    assert [window.scored for window in question.windows] == [3, 3]


def test_what_is_scored_is_the_space_and_the_ending(tmp_path):
    """Tokenised apart: ctx's last letters and the ending never share a token."""
    joined = bpe([*(bytes([b]) for b in range(256)), b" b", b"a "])
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "a", "endings": ["b", "cc"], "label": 0}))
    (question,) = choices.read(path, joined, 8)
    assert [(list(w.ids), w.scored) for w in question.windows] == [
        ([ord("a"), 256], 1),
        ([ord("a"), *b" cc"], 3),
    ]


def test_a_context_is_cut_on_the_left(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "abcdefgh", "endings": ["x", "yyyyyyy"], "label": 0}))
    (question,) = choices.read(path, byte(), 8)
    assert bytes(question.windows[0].ids) == b"cdefgh x"[-9:].rjust(9, b"b")
    assert bytes(question.windows[1].ids) == b"h yyyyyyy" and question.windows[1].scored == 8
    assert question.cut
    (question,) = choices.read(path, byte(), 15)
    assert question.windows[1].ids[0] == ord("a") and not question.cut


BAD = {
    "{": "line 2: Expecting property name",
    "[1]": r"line 2: a question must be an object with ctx, endings and label, got \[1\]",
    '{"ctx": 5, "endings": ["a", "b"], "label": 0}': "line 2: ctx must be a string, got 5",
    '{"endings": ["a", "b"], "label": 0}': "line 2: ctx must be a string, got no such key",
    '{"ctx": "a", "ctx": "b", "endings": ["a", "b"], "label": 0}': "line 2: key 'ctx' twice",
    '{"ctx": "a", "endings": "ab", "label": 0}': "line 2: endings must be at least 2 .* got 'ab'",
    '{"ctx": "a", "endings": ["a"], "label": 0}': r"endings must be at least 2 .* got \['a'\]",
    '{"ctx": "a", "endings": ["a", ""], "label": 0}': "endings must be .*, none empty, got",
    '{"ctx": "a", "endings": ["a", 5], "label": 0}': r"endings must be .*, got \['a', 5\]",
    '{"ctx": "a", "label": 0}': "endings must be at least 2 .* got no such key",
    '{"ctx": "a", "endings": ["a", "b"]}': "label must be 0 to 1, .* got no such key",
    '{"ctx": "a", "endings": ["a", "b"], "label": 2}': "label must be 0 to 1, the number .* got 2",
    '{"ctx": "a", "endings": ["a", "b"], "label": -1}': "label must be 0 to 1, .* got -1",
    '{"ctx": "a", "endings": ["a", "b"], "label": "-1"}': "label must be 0 to 1, .* got '-1'",
    '{"ctx": "a", "endings": ["a", "b"], "label": ""}': "label must be 0 to 1, .* got ''",
    '{"ctx": "a", "endings": ["a", "b"], "label": "²"}': "label must be 0 to 1, .* got '²'",
    '{"ctx": "a", "endings": ["a", "b"], "label": true}': "label must be 0 to 1, .* got True",
    '{"ctx": "a", "endings": ["a", "b"], "label": 1.0}': "label must be 0 to 1, .* got 1.0",
    '{"ctx": "a", "endings": ["a", "b"], "label": null}': "label must be 0 to 1, .* got None",
    '{"ctx": "é", "endings": ["a", "b"], "label": 0}': "ctx: character 'é' .* is not among",
    '{"ctx": "a", "endings": ["a", "é"], "label": 0}': "endings: character 'é' .* is not among",
    '{"ctx": "a", "endings": ["a", "\\ud800"], "label": 0}': "endings: .* half a surrogate pair",
    '{"ctx": "", "endings": ["a", "b"], "label": 0}': "ctx must not be empty for a tokenizer",
    '{"ctx": "a", "endings": ["a", "bbbbbbbb"], "label": 0}': "at most block_size 8 .* got 9",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=BAD)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "q.jsonl"
    good = '{"ctx": "a", "endings": ["a", "bbbbbbb"], "label": 1}'
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        choices.read(path, char(" ab"), 8)
    assert re.match(f"choices '{path}', line 2: ", str(error.value))
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "must hold a question a line, got none"),
        (b" \n\n", "must hold a question a line, got none"),
        (b'{"ctx": "\xe9"}', "must be UTF-8, got 0xe9 at byte 9"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_none_is_named(content, message, tmp_path):
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"choices '{path}' {message}"):
        choices.read(path, byte(), 8)


def test_choices_of_a_broken_model_are_none(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"ctx": "a", "endings": ["a", "b"], "label": 0}')
    with pytest.raises(NonFiniteError, match="log-probabilities of endings are"):
        choices.evaluate(constant_model([0.0, math.nan, 0.0]), choices.read(path, char(" ab"), 8))


# ---- the command line


TEXT = "the cat sat on the mat, and the dog sat on the cat. "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, of bytes and of characters; texts, shards, and questions."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, tokenizer in (("run", byte()), ("chars", char(TEXT + "é"))):
        config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
        (folder / name).mkdir()
        checkpoint.write(
            folder / name / checkpoint.FILE, config, weights.of_model(model_in(config)), step=0
        )
        (folder / name / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "text.txt").write_text(TEXT * 5)
    (folder / "one.txt").write_text("t")
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text(TEXT)
    (folder / "corpus" / "b.txt").write_text(TEXT[::-1])
    (folder / "shards").mkdir()
    for part in ("train", "val"):
        ids = byte().encode(TEXT * 2 if part == "val" else TEXT[::-1])
        shards.write(folder / "shards" / f"{part}_0.bin", ids)
    questions = [{"ctx": "the cat", "endings": ["sat", "mat"], "label": i} for i in (0, 1, 1)]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "bad.jsonl").write_text('{"ctx": "the", "endings": ["a", "b"], "label": ""}')
    return folder


def printed(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def of_json(capsys, *arguments):
    text = printed(capsys, *arguments, "--json")
    assert text.count("\n") == 1
    return json.loads(text)


def run_of(made, name="run"):
    """The model that the command loads, to compute the same without it."""
    model, tokenizer = sampling.load(made / name)
    model.fast = True
    return model, tokenizer


def test_the_command_prints_what_the_functions_return(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    model, tokenizer = run_of(made)
    ids = tokenizer.encode(TEXT * 5)
    want = perplexity(model, ids, context=9, stride=4, tokenizer=tokenizer)
    found = of_json(
        capsys, "run", "--data", "text.txt", "--context", 9, "--stride", 4, "--batch-size", 3
    )
    assert found.keys() == {"data"}
    assert found["data"].pop("tokens_per_second") > 0
    assert found["data"] == {
        "nats_per_token": pytest.approx(want.nats_per_token, rel=1e-6),
        "perplexity": pytest.approx(want.perplexity, rel=1e-6),
        "bits_per_byte": pytest.approx(want.bits_per_byte, rel=1e-6),
        "tokens": len(ids) - 1, "bytes": len(ids) - 1, "context": 9, "stride": 4,
    }  # fmt: skip
    text = printed(capsys, "run", "--data", "text.txt", "--context", 9, "--stride", 4)
    assert re.fullmatch(
        rf"data 'text.txt': {want.nats_per_token:.4f} nats per token, perplexity "
        rf"{want.perplexity:.2f}, {want.bits_per_byte:.4f} bits per byte; {len(ids) - 1:,} tokens, "
        rf"{len(ids) - 1:,} bytes, context 9, stride 4, [\d,]+ tokens/s\n",
        text,
    )


def test_the_command_answers_questions(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    model, tokenizer = run_of(made)
    want = choices.evaluate(model, choices.read("q.jsonl", tokenizer, L))
    assert {want.acc, want.acc_norm, want.acc_token} <= {1 / 3, 2 / 3}
    found = of_json(capsys, "run", "--choices", "q.jsonl")["choices"]
    assert found == want.figures()
    assert found["acc_stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert (found["questions"], found["cut"]) == (3, 0)
    text = printed(capsys, "run", "--choices", "q.jsonl")
    assert text.startswith(f"choices 'q.jsonl': acc {want.acc:.4f} ± 0.3333, acc_norm ")
    assert text.endswith("; 3 questions\n")
    both = of_json(capsys, "run", "--choices", "q.jsonl", "--data", "text.txt")
    assert both["choices"] == found and both["data"]["tokens"] == len(TEXT * 5) - 1


def test_what_was_cut_is_said():
    result = choices.Accuracy(1, 1.0, 0.0, 1.0, cut=1, seconds=1.0)
    assert str(result).endswith("; 1 questions, 1 of them with a ctx that was cut")
    assert "±" not in str(result), "one question has no standard error"
    assert result.figures()["acc_stderr"] is None and result.figures()["cut"] == 1
    json.dumps(result.figures(), allow_nan=False)


def test_what_is_infinite_is_null_in_json():
    result = perplexity(constant_model([1e4, 0.0]), [0, 1])
    assert result.figures()["perplexity"] is None
    json.dumps(result.figures(), allow_nan=False)


def test_documents_are_packed_as_training_packs_them(made, monkeypatch, capsys):
    """A folder's files with a newline between them, as these tokenizers have no <|endoftext|>."""
    monkeypatch.chdir(made)
    model, tokenizer = run_of(made)
    ids = tokenizer.encode(f"{TEXT}\n{TEXT[::-1]}")
    found = of_json(capsys, "run", "--data", "corpus", "--stride", L)["data"]
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, len(ids) - 1)
    assert found["nats_per_token"] == pytest.approx(
        perplexity(model, ids, stride=L).nats_per_token, rel=1e-6
    )


def test_eot_stands_between_documents(made):
    split = data.whole(str(made / "corpus"), BYTES_AND_EOT)
    (ids,) = split.parts
    assert ids.tolist() == [*TEXT.encode(), 256, *TEXT[::-1].encode()]


def test_shards_are_evaluated_each_by_itself(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    model, _ = run_of(made)
    parts = [byte().encode(TEXT[::-1]), byte().encode(TEXT * 2)]
    found = of_json(capsys, "run", "--data", "shards")["data"]
    assert found["tokens"] == 3 * len(TEXT) - 2
    assert found["nats_per_token"] == pytest.approx(
        perplexity(model, *parts).nats_per_token, rel=1e-6
    )
    found = of_json(capsys, "run", "--data", "shards/val*.bin")["data"]
    assert found["tokens"] == 2 * len(TEXT) - 1


def test_from_standard_input(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    from_file = of_json(capsys, "run", "--data", "text.txt")["data"]
    stdin = types.SimpleNamespace(buffer=io.BytesIO((TEXT * 5).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    from_stdin = of_json(capsys, "run", "--data", "-")["data"]
    del from_file["tokens_per_second"], from_stdin["tokens_per_second"]
    assert from_stdin == from_file


def test_models_of_other_formats(made, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(made)
    want = of_json(capsys, "run", "--data", "text.txt")["data"]["perplexity"]
    for to, name in (("hf", "hf"), ("llmc", "model.bin"), ("nanogpt", "ckpt.pt")):
        assert main(["convert", "run", str(tmp_path / name), "--to", to]) == 0
        capsys.readouterr()
        found = of_json(capsys, tmp_path / name, "--tokenizer", "byte", "--data", "text.txt")
        assert found["data"]["perplexity"] == pytest.approx(want, rel=1e-6)


def test_int8_is_evaluated(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    model, tokenizer = run_of(made)
    ids = tokenizer.encode(TEXT * 5)
    want = perplexity(quantize_int8(model), ids).nats_per_token
    found = of_json(
        capsys,
        *("run", "--data", "text.txt", "--quantize", "int8", "--quantize-data", "text.txt"),
    )
    assert found["data"]["nats_per_token"] == pytest.approx(want, rel=1e-6)
    assert want != perplexity(run_of(made)[0], ids).nats_per_token


WRONG = {
    "eval": "required: MODEL",
    "eval run": "data or choices must be given, got neither",
    "eval none --data text.txt": "model must be .* got 'none'",
    "eval run --data none.txt": "data must be a file, .* got 'none.txt'",
    "eval run --data empty.txt": "data 'empty.txt' is empty",
    "eval run --data one.txt": "text must be at least 2 tokens, .* got 1",
    "eval run --data latin1.txt": "data 'latin1.txt' must be UTF-8, got 0xe9 at byte 3",
    "eval chars --data q.jsonl": "data 'q.jsonl': character '{' .* is not among",
    "eval chars --data shards": "data 'shards/train_0.bin' must hold ids below vocab_size 15, got",
    "eval run --data text.txt --context 17": "context must be 1 to block_size 16, got 17",
    "eval run --data text.txt --stride 17": "stride must be 1 to context 16, got 17",
    "eval run --data text.txt --stride 0": "stride must be 1 to context 16, got 0",
    "eval run --data text.txt --batch-size 0": "batch_size must be at least 1, got 0",
    "eval run --choices q.jsonl --batch-size 0": "batch_size must be at least 1, got 0",
    "eval run --choices q.jsonl --stride 4": "stride must be absent without data, got 4",
    "eval run --choices q.jsonl --context 4": "context must be absent without data, got 4",
    "eval run --choices none": "choices 'none' cannot be read: No such file",
    "eval run --choices bad.jsonl": "choices 'bad.jsonl', line 1: label must be 0 to 1, .* got ''",
    "eval run --data text.txt --choices bad.jsonl": "choices 'bad.jsonl', line 1: label must be",
    "eval run --data text.txt --quantize int4": "quantize must be int8, got int4",
    "eval run --data text.txt --device warp": "device must be auto or one that works here",
}


@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_computed(
    command, message, made, monkeypatch, capsys
):
    monkeypatch.chdir(made)
    monkeypatch.setattr(evaluate, "score", lambda *args: pytest.fail("computed"))
    assert main(command.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert re.match(rf"gpt2: error: .*{message}", line)


def test_a_broken_model_is_one_line(made, monkeypatch, capsys, tmp_path):
    model, tokenizer = run_of(made)
    with torch.no_grad():
        model.transformer["ln_f"].bias.fill_(math.nan)
    checkpoint.write(tmp_path / checkpoint.FILE, model.config, weights.of_model(model), step=0)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    assert main(["eval", str(tmp_path), "--data", str(made / "text.txt")]) == 1
    assert re.search(r"gpt2: error: the loss over 259 tokens is nan\n$", capsys.readouterr().err)


def test_gpt2_s_tokenizer_and_context_on_shakespeare(capsys, tmp_path):
    """The whole way at the size of GPT-2's vocabulary, against each window by itself."""
    folder = os.environ.get("GPT2_TEST_DATA")
    if folder is None or not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT2_TEST_DATA or TIKTOKEN_CACHE_DIR is not set: no text or no vocabulary")
    text = (Path(folder) / "tinyshakespeare.txt").read_text()[:4000]
    (tmp_path / "text.txt").write_text(text)
    tokenizer = gpt2()
    model = model_in(Config(128, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64)).cpu().eval()
    model.save_pretrained(tmp_path / "hf")
    ids = torch.from_numpy(tokenizer.encode(text).astype(np.int64))
    nats = 0.0
    for start in range(0, len(ids) - 1, 128):
        window = ids[start : start + 129][None]
        with torch.no_grad():
            logits, _ = model.double()(window[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="none")
        nats += losses.sum().item()
    found = of_json(capsys, tmp_path / "hf", "--data", tmp_path / "text.txt", "--stride", 128)
    found = found["data"]
    assert (found["tokens"], found["bytes"]) == (
        len(ids) - 1, len(text.encode()) - len(tokenizer.tokens[ids[0]]),
    )  # fmt: skip
    assert found["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-6)
