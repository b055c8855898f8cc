"""Sampled text: whole characters, in the order of the prompts, up to the end of each text."""

import io
import json
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import model_in

from gpt2 import Config, Model
from gpt2.checkpoints import convert
from gpt2.cli import main
from gpt2.data.tokenizer import bpe, byte, char
from gpt2.errors import InputError
from gpt2.generate import completion, decoding, quantize
from gpt2.generate.completion import Completion, Sampling, complete

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

BYTES = Config(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def scripted(monkeypatch):
    """A model that samples scripted tokens: for each prompt, by its ids, the next of the script."""

    def script(texts):
        asked = []

        def tokens(model, prompts, n, how, *, seed, ended):
            asked.append(prompts)
            for step in range(n):
                rows = [texts[len(asked) - 1][i] for i in range(len(prompts))]
                over = ended()
                if all(over):
                    return
                yield torch.tensor(
                    [-1 if over[i] else row[min(step, len(row) - 1)] for i, row in enumerate(rows)]
                )

        monkeypatch.setattr(decoding, "tokens", tokens)
        monkeypatch.setattr(decoding, "check_batch", lambda *args: None)
        return asked

    return script


def written(tokenizer, n=99, prompts=("x",), **kwargs):
    return list(complete(None, tokenizer, prompts, n, **kwargs))


# ---- a text


def test_text_streams_in_whole_characters(scripted):
    ids = [*"né 😀".encode(), 0xF0, 0x9F]
    scripted([[ids], [ids]])
    *pieces, end = written(byte(), len(ids))
    assert pieces == ["n", "é", " ", "😀", "\ufffd"]
    assert end == Completion("x", "né 😀\ufffd", len(ids), "length")
    *_, end = written(byte(), len(ids), stop=["\ufffd"])
    assert end == Completion("x", "né 😀", len(ids), "stop")


def test_text_ends_with_its_document(scripted):
    tokenizer = bpe([bytes([b]) for b in range(256)])
    asked = scripted([[[97, 98, 256, 99]]])
    assert written(tokenizer, prompts=[""]) == ["a", "b", Completion("", "ab", 3, "end")]
    assert asked == [[[256]]], "an empty prompt starts a document"


@pytest.mark.parametrize(("alphabet", "start"), [("\nab", 0), ("ab", 0), ("\tab\n", 1)])
def test_an_empty_prompt_starts_a_line(alphabet, start, scripted):
    asked = scripted([[[1]]])
    written(char(alphabet), 1, prompts=[""])
    assert asked == [[[start]]]


STOPS = {
    "in one token's midst": ("abc", ["b"], ["a"], "a", 2),
    "over tokens": ("abcd", ["bc"], ["a"], "a", 3),
    "not it after all": ("abab", ["ac"], ["ab", "ab"], "abab", 4),
    "a beginning in itself": ("aaab", ["aab"], ["a"], "a", 4),
    "the first of several": ("abcd", ["cd", "b"], ["a"], "a", 2),
    "the one that begins first": ("xab", ["b", "ab"], ["x"], "x", 3),
    "never": ("abc", ["x"], ["a", "b", "c"], "abc", 3),
    "at once": ("abc", ["a"], [], "", 1),
    "held to the end": ("ab", ["bc"], ["a", "b"], "ab", 2),
}


@pytest.mark.parametrize(("text", "stop", "pieces", "kept", "tokens"), STOPS.values(), ids=STOPS)
def test_a_text_ends_before_a_stop_string(text, stop, pieces, kept, tokens, scripted):
    scripted([[text.encode()]])
    *found, end = written(byte(), len(text), stop=stop)
    assert found == pieces and "".join(found) == kept
    finish = "stop" if any(s in text for s in stop) else "length"
    assert end == Completion("x", kept, tokens, finish)


@given(text=st.text("aab", max_size=20), stop=st.lists(st.text("ab", min_size=1), max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_nothing_is_held_back_but_beginnings_of_stops(text, stop):
    reader = completion._Text("", byte(), stop)
    for n, token in enumerate(text.encode(), 1):
        reader.take(token)
        if any(s in text[:n] for s in stop):
            break
        rest = text[len(reader.text) : n]
        could = [s for s in stop if len(s) > len(rest) and s.startswith(rest)]
        assert reader.text + rest == text[:n] and (could or not rest)
        longer = text[len(reader.text) - 1 : n] if reader.text else None
        assert longer is None or not any(s != longer and s.startswith(longer) for s in stop)
    reader.close()
    ends = min((text.find(s) for s in stop if s in text), default=len(text))
    first = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    if first is not None:  # the stop that is complete first; of several, the one that starts first
        whole = [text[:first].find(s) for s in stop if s in text[:first]]
        ends = min(whole)
    assert reader.text == text[:ends]
    assert reader.finish == ("length" if first is None else "stop")


def test_a_stop_string_of_nothing_is_refused():
    with pytest.raises(InputError, match="stop must be strings of at least one character"):
        complete(None, byte(), ["x"], 1, stop=["a", ""])


# ---- several


def test_texts_come_in_the_order_of_their_prompts(scripted):
    """The second text ends before the first, and must wait."""
    asked = scripted([[b"abcd", b"x\nz"], [b"e"]])
    found = written(byte(), 4, prompts=["1", "2", "3"], stop=["\n"], batch_size=2)
    assert found == [
        *"abcd",
        Completion("1", "abcd", 4, "length"),
        "x",
        Completion("2", "x", 2, "stop"),
        *"eeee",
        Completion("3", "eeee", 4, "length"),
    ]
    assert asked == [[[49], [50]], [[51]]]


def test_no_step_after_the_last_text_has_ended():
    model = model_in(BYTES).eval()
    first = {p: int(next(decoding.tokens(model, [[p]], 1, Sampling(0.0)))) for p in range(128)}
    prompt, token = next((p, token) for p, token in first.items() if token < 128)
    calls = []
    hidden = model.hidden
    model.hidden = lambda *args: calls.append(1) or hidden(*args)
    (end,) = complete(model, byte(), [chr(prompt)], 50, Sampling(0.0), stop=[chr(token)])
    assert end == Completion(chr(prompt), "", 1, "stop") and len(calls) == 1


@pytest.mark.parametrize("fast", [False, True])
def test_a_text_is_the_same_in_every_batch(fast):
    model = model_in(BYTES, fast=fast).eval()
    prompts = ["ab", "c", "ab", "defg", ""]
    results = [
        [p for p in complete(model, byte(), prompts, 6, seed=3, batch_size=size)
         if isinstance(p, Completion)]
        for size in (1, 2, 5)
    ]  # fmt: skip
    assert results[0] == results[1] == results[2]
    assert results[0][0].text != results[0][2].text, "equal prompts differ"
    assert [c.prompt for c in results[0]] == prompts


def test_speed_counts_steps_between_the_first_and_the_last():
    model, speed = model_in(BYTES, fast=True).eval(), completion.Speed()
    list(complete(model, byte(), ["ab", "c", "d"], 4, seed=1, batch_size=2, speed=speed))
    assert (speed.steps, speed.tokens) == (6, 9)  # 3 steps each; 3 tokens from each of 3 prompts
    matrices = 4 * (2 * (12 * 16 * 16 + 13 * 16) + 2 * 16 + 256 * 16)
    cache = 4 * 2 * 2 * 16
    seen = sum((2 + n) + (1 + n) + (1 + n) for n in (1, 2, 3))
    assert speed.bytes == 6 * matrices + cache * seen
    assert speed.seconds > 0 and str(speed).startswith("9 tokens, ")
    rows = (2 * 9 * 16 + 256) * (64 + 4)  # 64 int8 numbers and a scale each
    rest = 4 * (2 * 13 * 16 + 2 * 16)
    int8 = quantize.quantize_int8(model)
    assert decoding.step_bytes(int8, [3, 4]) == rows + rest + cache * 7
    room = int8.config.block_size
    assert decoding.step_bytes(int8, [1, room]) == rows + rest + cache * (1 + room)
    assert decoding.step_bytes(int8, [1, room + 1]) == rows + rest  # nothing is cached


def test_speed_leaves_out_texts_that_have_ended_and_the_time_of_others(scripted, monkeypatch):
    scripted([[b"a\n", b"xyz"]])
    clock, steps = [0], decoding.tokens

    def tokens(*args, **kwargs):
        for step in steps(*args, **kwargs):
            clock[0] += 1
            yield step

    monkeypatch.setattr(decoding, "tokens", tokens)
    monkeypatch.setattr(decoding, "step_bytes", lambda model, lengths: sum(lengths))
    monkeypatch.setattr(completion.time, "perf_counter", lambda: clock[0])
    speed = completion.Speed()
    for _ in complete(None, byte(), ["1", "22"], 3, stop=["\n"], speed=speed):
        clock[0] += 100
    assert speed == completion.Speed(
        steps=2, tokens=3, seconds=2, bytes=(1 + 1) + (2 + 1) + (2 + 2)
    )


# ---- prompts


def test_prompts_are_lines(tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes("one\r\n\n thrée \u2028x".encode())
    assert completion.read_prompts(str(tmp_path / "p")) == ["one", "", " thrée \u2028x"]
    (tmp_path / "p").write_bytes(b"one\n")
    assert completion.read_prompts(str(tmp_path / "p")) == ["one"]
    (tmp_path / "p").write_bytes(b"")
    assert completion.read_prompts(str(tmp_path / "p")) == []
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "id": 1}\n{"prompt": ""}\n')
    assert completion.read_prompts(str(tmp_path / "p.jsonl")) == ["a\nb", ""]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"a\nb\n")))
    assert completion.read_prompts("-") == ["a", "b"]


@pytest.mark.parametrize("line", ["", "x", "[]", "{}", '{"prompt": 1}', '{"prompt": null}', "1"])
def test_a_broken_line_is_named(line, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=r'p.jsonl\', line 2 must be {"prompt": TEXT}') as error:
        completion.read_prompts(str(path))
    assert "\n" not in str(error.value)


def test_prompts_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"prompts '.*none' cannot be read: No such file"):
        completion.read_prompts(str(tmp_path / "none"))
    (tmp_path / "p").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="p', line 1 must be UTF-8, got 0xff at byte 2"):
        completion.read_prompts(str(tmp_path / "p"))


# ---- models


# ---- the command


@pytest.fixture
def saved(tmp_path):
    """The folder of a run with byte tokens."""
    Model(BYTES).save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "run", "run", tokenizer="byte")
    return tmp_path


def run(capsys, *arguments):
    assert main(["sample", *map(str, arguments)]) == 0
    return capsys.readouterr()


def test_json_lines_of_a_file_of_prompts(saved, capsys):
    folder = saved
    (folder / "p.jsonl").write_text('{"prompt": "a\\n"}\n{"prompt": "é"}\n')
    flags = ("--prompts", folder / "p.jsonl", "--max-new-tokens", 5, "--seed", 1, "--jsonl")
    printed = run(capsys, folder / "run", *flags, "--num-samples", 2)
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a\n", "a\n", "é", "é"]
    assert all(set(line) == {"prompt", "text", "tokens", "finish"} for line in lines)
    assert all(line["tokens"] == 5 and line["finish"] == "length" for line in lines)
    assert lines[0]["text"] != lines[1]["text"]
    for dtype in ("float32", "bfloat16"):
        one = run(capsys, folder / "run", *flags, "--dtype", dtype, "--batch-size", 1)
        assert len(one.out.splitlines()) == 2


def test_text_of_standard_input_and_speed_on_stderr(saved, capsys, monkeypatch):
    folder = saved
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"ab\ncd\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    flags = ("--tokenizer", "byte", "--max-new-tokens", 3, "--temperature", 0)
    printed = run(capsys, folder / "hf", *flags, "--prompts", "-")
    first, second = printed.out.split("\n" + "-" * 40 + "\n")
    assert first.startswith("ab") and second.startswith("cd") and second.endswith("\n")
    assert "gpt2: 4 tokens, " in printed.err and "GB/s of its memory" in printed.err
    assert "GB/s" not in run(capsys, folder / "hf", *flags, "--no-fast").err
    stop = first[2:]
    printed = run(capsys, folder / "hf", *flags, "--prompt", "ab", "--stop", "~~", "--stop", stop)
    assert printed.out == "ab\n"


def test_quantize_says_what_it_costs(saved, capsys):
    folder = saved
    (folder / "t").write_text("some text to measure it on")
    flags = (folder / "run", "--quantize", "int8", "--max-new-tokens", 1)
    printed = run(capsys, *flags, "--quantize-data", folder / "t")
    assert "gpt2: int8 changes perplexity by " in printed.err
    assert f"on 26 tokens of {str(folder / 't')!r}" in printed.err
    printed = run(capsys, *flags)
    assert "on 1,024 tokens of Python's language reference" in printed.err


WRONG = {
    "--prompts none": "prompts 'none' cannot be read: No such file or directory",
    "--batch-size 0": "batch_size must be at least 1, got 0",
    "--dtype float8": "dtype must be auto, float32 or bfloat16, got 'float8'",
    "--quantize int4": "quantize must be int8 or absent, got int4",
    "--quantize int8 --quantize-data none": "data must be a file",
    "--tokenizer gpt5": "tokenizer must be byte, gpt2, a file",
    "--stop=": "stop must be strings of at least one character, got an empty one",
}


@pytest.mark.parametrize(("flags", "message"), WRONG.items(), ids=WRONG)
def test_wrong_flags_are_one_line(flags, message, saved, capsys, monkeypatch):
    folder = saved
    monkeypatch.chdir(folder)
    assert main(["sample", "run", *flags.split()]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"gpt2: error: {message}") and printed.out == ""
