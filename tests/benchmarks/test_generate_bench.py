"""benchmarks/generate.py times the documented passes, and does not time wrong results."""

import json
from types import SimpleNamespace

import generate
import pytest
import torch
from bench import generators, harness, result_file

from gpt2 import Config, Model
from gpt2.generate import decoding
from gpt2.generate.quantize import quantize_int8

pytestmark = pytest.mark.usefixtures("without_the_interpreter")
TINY = Config(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture
def tiny(monkeypatch):
    """The script, with a model that takes no time."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(generate.Config, "named", staticmethod(lambda name: TINY))


def bench(tmp_path, *more):
    path = tmp_path / "out.json"
    argv = [
        "--tokens",
        "4",
        "--device",
        "cpu",
        "--quick",
        "--shapes",
        "2x5",
        "--json",
        str(path),
        *more,
    ]
    code = harness.run("generate", generate.CASES, generate.BACKENDS, generate.PEERS, doc="",
                       dims=generate.DIMS, shapes=generate.SHAPES, argv=argv, more=generate.more,
                       own=("chosen", "tokens"))  # fmt: skip
    rows = json.loads(path.read_text())["results"]
    return code, {(r["op"], r["contender"], r["step"]): r for r in rows}


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_of_this_machine(dtype, tiny, tmp_path):
    pytest.importorskip("transformers")
    peers = "plain,transformers,transformers-static,whole"
    code, rows = bench(tmp_path, "--dtype", dtype, "--peers", peers)
    assert code == 0
    assert {(op, name) for op, name, _ in rows} == {
        ("generate", "fast"), ("generate", "plain"), ("generate", "transformers"),
        ("generate", "transformers-static"), ("generate_int8", "fast-int8"),
        ("generate_int8", "whole"),
    }  # fmt: skip
    for (_, _, step), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0
        assert row["unit"] == ("GB/s read" if step == "decode" else "GFLOP/s")
        tokens = 2 if step == "decode" else 2 * 5
        assert row["details"]["tokens_per_s"] == pytest.approx(tokens / row["median_ms"] * 1e3)


def test_wrong_tokens_are_reported_and_not_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        generators, "_ours", lambda model, fast, prompts, n: prompts[:, :1].repeat(1, n)
    )
    code, rows = bench(tmp_path, "--peers", "none")
    assert code == 1
    assert all(
        r["status"] == "wrong" and "below the likeliest" in r["reason"] for r in rows.values()
    )


def test_shortfall_is_of_the_worst_choice():
    model = Model(TINY).eval()
    prompts = torch.randint(65, (3, 5))
    best = model.generate(prompts, 4, temperature=0.0)[:, 5:]
    assert generate.shortfall(model, prompts, best)[0] == 0.0
    logits = model(torch.cat([prompts, best], 1)[:, :7])[0][:, -1]
    worse = best.clone()
    worse[1, 2] = logits[1].argmin()
    short, largest = generate.shortfall(model, prompts, worse)
    assert short >= (logits[1].max() - logits[1].min()).item() > 0 and largest >= logits[1].max()


def test_a_step_is_a_call_less_its_prompt(tiny):
    """A call of one token takes 10 ms, one of four takes 16 ms: 2 ms per token."""
    calls = []

    def clock(runs):
        calls.append([n for _, n in runs])
        return {(c, n): {"median_ms": 8.0 + 2 * n} for c, n in runs}

    clock.device = torch.device("cpu")
    kept = result_file.Record(None, "generate", {}, only={"backend": ["fast"], "peer": []})
    limit = {"GB/s read": 1.0, "GFLOP/s": 1.0}
    shape = SimpleNamespace(B=2, P=5)
    generate.CASES[0](shape, torch.float32, clock, limit, kept, chosen=["gpt2"], tokens=4)
    prefill, decode = kept.results
    assert (prefill.step, prefill.median_ms) == ("prefill", 10.0)
    assert (decode.step, decode.median_ms) == ("decode", 2.0) and calls == [[1], [1, 4]]
    assert decode.details["tokens_per_s"] == 1000.0
    assert decode.rate == decoding.step_bytes(Model(TINY), [7, 7]) / 2e-3 / 1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_step_are_those_of_the_model(dtype):
    model = Model(TINY).to(dtype)
    lengths = [3, 9]
    whole = generate.bytes_of_a_step(TINY, "fast", dtype, lengths)
    assert whole == decoding.step_bytes(model, lengths)
    int8 = generate.bytes_of_a_step(TINY, "ctranslate2-int8", dtype, lengths)
    assert int8 == decoding.step_bytes(quantize_int8(model), lengths)


def test_onnxruntime_agrees_where_it_is_installed(tiny, tmp_path):
    pytest.importorskip("optimum.onnxruntime")
    code, rows = bench(tmp_path, "--dtype", "float32", "--peers", "onnxruntime")
    assert code == 0
    assert {rows["generate", "onnxruntime", step]["status"] for step in ("prefill", "decode")} == {
        "ok"
    }


def test_models_that_were_not_asked_for_are_not_made(monkeypatch):
    monkeypatch.setattr(generate, "Model", None)
    for case in generate.CASES:
        assert case(None, None, None, None, None, chosen=["none"], tokens=4) is None
