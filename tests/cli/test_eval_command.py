"""gpt2 eval prints the results of the functions; an error is one line before any work."""

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
from scored_models import BYTES_AND_EOT, SMALL, L, constant_model
from small_models import model_in
from util import why_no_vocabulary

from gpt2 import Config, loading
from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.data import batches, shards
from gpt2.data.tokenizer import byte, char, gpt2
from gpt2.evaluate import multiple_choice, scoring
from gpt2.evaluate.scoring import perplexity
from gpt2.generate.quantize import quantize_int8

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

TEXT = "the cat sat on the mat, and the dog sat on the cat. "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs, with byte and with character tokens; texts, shards, and questions."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, tokenizer in (("run", byte()), ("chars", char(TEXT + "é"))):
        config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
        (folder / name).mkdir()
        checkpoint.write(
            folder / name / checkpoint.FILE, config, model_in(config).to_state(), step=0
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
    """The model that the command loads, to compute the same results without it."""
    model, tokenizer = loading.load(made / name)
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
    want = multiple_choice.evaluate(model, multiple_choice.read("q.jsonl", tokenizer, L))
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
    result = multiple_choice.Accuracy(1, 1.0, 0.0, 1.0, cut=1, seconds=1.0)
    assert str(result).endswith("; 1 questions, 1 of them with a ctx that was cut")
    assert "±" not in str(result), "one question has no standard error"
    assert result.figures()["acc_stderr"] is None and result.figures()["cut"] == 1
    json.dumps(result.figures(), allow_nan=False)


def test_what_is_infinite_is_null_in_json():
    result = perplexity(constant_model([1e4, 0.0]), [0, 1])
    assert result.figures()["perplexity"] is None
    json.dumps(result.figures(), allow_nan=False)


def test_documents_are_packed_as_training_packs_them(made, monkeypatch, capsys):
    """A folder's files are joined by a newline, because these tokenizers have no <|endoftext|>."""
    monkeypatch.chdir(made)
    model, tokenizer = run_of(made)
    ids = tokenizer.encode(f"{TEXT}\n{TEXT[::-1]}")
    found = of_json(capsys, "run", "--data", "corpus", "--stride", L)["data"]
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, len(ids) - 1)
    assert found["nats_per_token"] == pytest.approx(
        perplexity(model, ids, stride=L).nats_per_token, rel=1e-6
    )


def test_eot_stands_between_documents(made):
    split = batches.whole(str(made / "corpus"), BYTES_AND_EOT)
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
    "eval run --data text.txt --quantize int4": "quantize must be int8 or absent, got int4",
    "eval run --data text.txt --device warp": "device must be auto or one that works here",
}


@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_computed(
    command, message, made, monkeypatch, capsys
):
    monkeypatch.chdir(made)
    monkeypatch.setattr(scoring, "score", lambda *args: pytest.fail("computed"))
    assert main(command.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert re.match(rf"gpt2: error: .*{message}", line)


def test_a_broken_model_is_one_line(made, monkeypatch, capsys, tmp_path):
    model, tokenizer = run_of(made)
    with torch.no_grad():
        model.transformer["ln_f"].bias.fill_(math.nan)
    checkpoint.write(tmp_path / checkpoint.FILE, model.config, model.to_state(), step=0)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    assert main(["eval", str(tmp_path), "--data", str(made / "text.txt")]) == 1
    assert re.search(r"gpt2: error: the loss over 259 tokens is nan\n$", capsys.readouterr().err)


def test_gpt2_s_tokenizer_and_context_on_shakespeare(capsys, tmp_path):
    """The whole command with GPT-2's vocabulary, against each window alone."""
    folder = os.environ.get("GPT2_TEST_DATA")
    if folder is None:
        pytest.skip("set GPT2_TEST_DATA to a folder with tinyshakespeare.txt")
    if reason := why_no_vocabulary():
        pytest.skip(reason)
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
