"""Multiple choice: the scores of each question's endings equal a brute force."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scored_models import BYTES_AND_EOT, SMALL, L, constant_model, log_p
from small_models import model_in

from gpt2.data.tokenizer import bpe, byte, char
from gpt2.errors import InputError, NonFiniteError
from gpt2.evaluate import multiple_choice

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

QUESTIONS = [
    {"ctx": "A man sits.", "endings": ["He stands up.", "é"], "label": 0, "ctx_a": "A man sits."},
    {"ctx": "Two", "endings": ["three", "four five six", "seven", "eight"], "label": "2"},
    {"ctx": "A context that is far too long", "endings": ["x", "yes", "\u2028no"], "label": 1},
    {"ctx": "", "endings": ["start", "begin"], "label": "1"},
]


@pytest.fixture
def questions_file(tmp_path):
    """One question per line, with an empty line and a literal U+2028."""
    lines = [json.dumps(q, ensure_ascii=False) for q in QUESTIONS]
    path = tmp_path / "choices.jsonl"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def right_by_brute_force(model, block_size):
    """acc, acc_norm, acc_token of QUESTIONS, and the number of cut contexts."""
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
    questions = multiple_choice.read(questions_file, BYTES_AND_EOT, L)
    heard = []
    result = multiple_choice.evaluate(model, questions, batch_size, heard.append)
    want = right_by_brute_force(model, L)
    assert [result.acc, result.acc_norm, result.acc_token, result.cut] == want
    assert result.questions == 4 and sum(heard) == 11


def test_choices_by_hand(tmp_path):
    """a is likelier than b, and b than c; every ending's space has the same cost."""
    model = constant_model([0.0, 3.0, 2.0, 1.0])
    tokenizer = char(" abc")
    space, _, b, c = torch.tensor([0.0, 3.0, 2.0, 1.0]).log_softmax(0).tolist()

    def result(*questions):
        path = tmp_path / "q.jsonl"
        path.write_text("\n".join(json.dumps(q) for q in questions))
        return multiple_choice.evaluate(model, multiple_choice.read(path, tokenizer, 8))

    def question(label, *endings):
        return {"ctx": "a", "endings": list(endings), "label": label}

    both = result(question(0, "a", "b"), question(1, "a", "b"))
    assert (both.acc, both.acc_norm, both.acc_token, both.questions) == (0.5, 0.5, 0.5, 2)
    assert both.error(0.5) == pytest.approx(0.5)  # sqrt(0.5 * 0.5 / (2 - 1))
    assert result(question(0, "b", "b")).acc == 1, "of equals the first"
    assert result(question(0, "b", "b")).error(1.0) is None
    # log p is -3.4 for a space, -1.4 for b, -2.4 for c. A second b lowers the sum, but raises the
    # mean
    longer = result(question(1, "b", "bb"))
    assert (longer.acc, longer.acc_norm, longer.acc_token) == (0, 1, 1)
    # -4.9 and -8.3: divided by 1 and 2 characters (without the space), or by 2 and 3 tokens
    assert (space + 2 * c) / 2 > space + b and (space + 2 * c) / 3 < (space + b) / 2
    longer = result(question(1, "b", "cc"))
    assert (longer.acc, longer.acc_norm, longer.acc_token) == (0, 1, 0)


def test_a_byte_and_a_character_are_not_the_same(tmp_path):
    """acc_norm counts characters: é is one character of two bytes."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "a", "endings": ["é", "ab"], "label": 0}))
    (question,) = multiple_choice.read(path, byte(), 8)
    assert question.characters == [1, 2]
    assert [window.scored for window in question.windows] == [3, 3]


def test_what_is_scored_is_the_space_and_the_ending(tmp_path):
    """They are tokenized separately: no token contains parts of both ctx and ending."""
    joined = bpe([*(bytes([b]) for b in range(256)), b" b", b"a "])
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "a", "endings": ["b", "cc"], "label": 0}))
    (question,) = multiple_choice.read(path, joined, 8)
    assert [(list(w.ids), w.scored) for w in question.windows] == [
        ([ord("a"), 256], 1),
        ([ord("a"), *b" cc"], 3),
    ]


def test_a_context_is_cut_on_the_left(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"ctx": "abcdefgh", "endings": ["x", "yyyyyyy"], "label": 0}))
    (question,) = multiple_choice.read(path, byte(), 8)
    assert bytes(question.windows[0].ids) == b"cdefgh x"[-9:].rjust(9, b"b")
    assert bytes(question.windows[1].ids) == b"h yyyyyyy" and question.windows[1].scored == 8
    assert question.cut
    (question,) = multiple_choice.read(path, byte(), 15)
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
        multiple_choice.read(path, char(" ab"), 8)
    assert re.match(f"choices '{path}', line 2: ", str(error.value))
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "must hold one question per line, got none"),
        (b" \n\n", "must hold one question per line, got none"),
        (b'{"ctx": "\xe9"}', "must be UTF-8, got 0xe9 at byte 9"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_none_is_named(content, message, tmp_path):
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"choices '{path}'(, line 1)? {message}"):
        multiple_choice.read(path, byte(), 8)


def test_choices_of_a_broken_model_are_none(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"ctx": "a", "endings": ["a", "b"], "label": 0}')
    with pytest.raises(NonFiniteError, match="log-probabilities of endings are"):
        multiple_choice.evaluate(
            constant_model([0.0, math.nan, 0.0]), multiple_choice.read(path, char(" ab"), 8)
        )
