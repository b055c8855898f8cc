"""The benchmarks measure what they claim, refuse invalid options, and survive a failing peer.

Times are never tested, because a loaded machine would fail the test. The tests check that a wrong
kernel is detected and not timed, that every row has the data that a measurement needs, and that
README's tables are generated from the results.
"""

import dataclasses
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace as Shape

import pytest
import torch
from bench import (
    clock,
    harness,
    options,
)
from processes import run

from gpt2 import kernels

TINY = {
    "attention": "1x5x2x16,2x33x1x16",
    "layer_norm": "7x33",
    "gelu": "7x33",
    "cross_entropy": "9x101x16",
    "decode_attention": "2x17x2x16",
}
SLOW = ("layer_norm", "gelu", "cross_entropy", "decode_attention")  # tested by the others too
ON_CPU = ["--device", "cpu", "--backends", "reference", "--quick"]


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=pytest.mark.full if s in SLOW else ()) for s in TINY],
)
def test_script(script, tmp_path):
    """Every script, with every peer of this machine except torch.compile: see
    test_compiled_peer."""
    module = __import__(script)
    cpu = torch.device("cpu")
    peers = {peer.name for op in module.OPS for peer in op.peers(cpu)} - {"compiled"}
    peers -= {"formula-compiled"}
    done = run(
        f"benchmarks/{script}.py", "--shapes", TINY[script], "--device", "cpu", "--quick",
        "--peers", ",".join(sorted(peers)), "--json", tmp_path / "out.json",
        "--plot", tmp_path / "out.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.png"]

    document = json.loads((tmp_path / "out.json").read_text())
    about = document["environment"]
    assert (document["schema"], document["script"]) == (1, script)
    assert about["torch"] == torch.__version__ and about["device_name"] and about["threads"]
    assert {"triton", "cuda", "cudnn", "python", "commit", "dirty", "date"} <= about.keys()
    assert {u for unit in document["limits"].values() for u in unit} == {
        "GB/s",
        "GB/s read",
        "GFLOP/s",
    }

    rows = document["results"]
    steps = {(op.name, step) for op in module.OPS for step in op.passes}
    assert {(r["op"], r["step"]) for r in rows} == steps
    for name in kernels.BACKENDS:
        assert {(r["op"], r["step"]) for r in rows if r["contender"] == name} == steps
    assert {r["contender"] for r in rows} == {*kernels.BACKENDS, *peers}
    for r in rows:
        assert r["shape"].keys() == set(module.DIMS.split("x")) and r["dtype"] == "float32"
        if r["status"] == "ok":
            assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
            assert r["rate"] > 0 and r["percent_of_limit"] > 0 and r["max_error"] < 1e-2
            assert r["times_faster_than"].keys() >= {"eager"}
            assert r["peak_memory_bytes"] is None or r["peak_memory_bytes"] >= 0
        else:
            assert r["status"] == "unavailable" and r["reason"] and r["median_ms"] is None
    assert {r["contender"] for r in rows if r["status"] == "ok"} >= {"reference", "eager"}


@pytest.mark.full
def test_compiled_peer(tmp_path):
    """torch.compile, if the machine has a C++ compiler: checked and timed like any other
    contender."""
    done = run(
        "benchmarks/layer_norm.py", "--shapes", "7x33", "--device", "cpu", "--quick",
        "--peers", "formula-compiled", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    mine = [r for r in rows if r["contender"] == "formula-compiled"]
    assert len(mine) == 2
    for r in mine:
        if r["status"] != "ok":
            assert "compiler" in r["reason"].lower(), r["reason"]  # no compiler on this machine
            pytest.skip(r["reason"])


@pytest.mark.full
def test_interpreted_kernels_are_not_timed():
    done = run("benchmarks/gelu.py", *ON_CPU, "--shapes", "4x8", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1x2x3"], "'1x2x3' is not NxC in positive integers"),
        (["--shapes", "4x0"], "'4x0' is not NxC"),
        (["--shapes", "4x-8"], "'4x-8' is not NxC"),
        (["--shapes", "4x8,"], "'' is not NxC"),
        (["--dtype", "float8"], "'float8' is not one of float32, bfloat16, float16"),
        (["--backends", "cublas"], "'cublas' is not one of"),
        (["--peers", "apex"], "'apex' is not one of eager"),
        (["--json", "/nowhere/out.json"], "'/nowhere/out.json' cannot be written"),
        (["--plot", "/"], "'/' cannot be written"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--seconds", "0"], "'0' is not a positive number"),
        (["--resume"], "--resume needs --json"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_bad_options_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as exit:
        options.parse(arguments, "", "NxC", {"cpu": "4x8", "cuda": "4x8"}, ["triton"], ["eager"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def square_op(call, peers=(), **changes):
    """x² at (N, C), computed by `call` as our kernel."""
    op = harness.Op(
        name="square",
        kernel="gelu",
        inputs=lambda s, randn, _: [randn(s.N, s.C)],
        call=call,
        truth=lambda x: x * x,
        plain=lambda x: x * x,
        peers=lambda device: [harness.Contender("eager", lambda x: x * x), *peers],
        work=lambda s, step, size: clock.Work(2 * s.N * s.C * size, clock.BYTE),
    )
    return dataclasses.replace(op, **changes)


def bench(op, monkeypatch, tmp_path, *more):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "out.json"
    argv = [*ON_CPU, "--json", str(path), *more]
    code = harness.main([op], doc="", dims="NxC", shapes={"cpu": "4x8"}, argv=argv)
    assert list(tmp_path.iterdir()) == [path]  # no partial file is left
    rows = json.loads(path.read_text())["results"]
    return code, {(r["contender"], r["step"]): r for r in rows}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2.001 * x * dy


class SpoiltBySecondBackward(WrongGradient):
    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = 2 * x * dy
        x.data.zero_()
        return dx


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: x * x * 1.0001, "result 0 is off by"),
        (lambda x: torch.where(x == x.max(), torch.nan, x * x), "result 0 is off by nan"),
        (WrongGradient.apply, "gradient 0 is off by"),
        (SpoiltBySecondBackward.apply, "gradient 0 is off by"),
    ],
    ids=["value", "nan", "gradient", "second-backward"],
)
def test_a_wrong_kernel_is_reported_and_not_timed(call, reason, monkeypatch, tmp_path, capsys):
    code, rows = bench(square_op(call), monkeypatch, tmp_path)
    assert code == 1
    for step in ("forward", "backward"):
        ours = rows["reference", step]
        assert ours["status"] == "wrong" and ours["median_ms"] is None and reason in ours["reason"]
        assert rows["eager", step]["status"] == "ok"  # the others go on
    assert f"FAILED reference square N=4 C=8: {reason}" in capsys.readouterr().err


def broken(x):
    raise ValueError("out of luck\nand of lines")


def test_a_failing_peer_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    op = square_op(
        lambda x: x * x,
        peers=[
            harness.Contender("broken", broken),
            harness.Contender("absent", None, why_not="not installed"),
            harness.Contender("sloppy", lambda x: x * x + 1),
        ],
    )
    code, rows = bench(op, monkeypatch, tmp_path)
    assert code == 0 and rows["reference", "backward"]["status"] == "ok"
    states = {name: (r["status"], r["reason"]) for (name, _), r in rows.items()}
    assert states["broken"] == ("unavailable", "ValueError: out of luck and of lines")
    assert states["absent"] == ("unavailable", "not installed")
    assert states["sloppy"][0] == "wrong"
    assert "broken" in capsys.readouterr().out


def test_a_failing_backend_fails_the_run(monkeypatch, tmp_path):
    code, rows = bench(square_op(broken), monkeypatch, tmp_path)
    assert code == 1 and rows["reference", "forward"]["status"] == "error"


def test_an_operation_without_gradients(monkeypatch, tmp_path):
    """Its value is checked, and a wrong value is detected."""
    forward = {"passes": ("forward",)}
    code, rows = bench(square_op(WrongGradient.apply, **forward), monkeypatch, tmp_path)
    assert code == 0 and rows.keys() == {("reference", "forward"), ("eager", "forward")}
    code, rows = bench(square_op(lambda x: x * x + 1, **forward), monkeypatch, tmp_path)
    assert code == 1 and rows["reference", "forward"]["status"] == "wrong"


def test_what_no_time_is_left_for_is_skipped(monkeypatch, tmp_path):
    op = square_op(broken, peers=[harness.Contender("absent", None, why_not="not installed")])
    code, rows = bench(op, monkeypatch, tmp_path, "--seconds", "1e-9")
    assert code == 0
    assert {(r["status"], r["reason"]) for (name, _), r in rows.items() if name != "absent"} == {
        ("skipped", "out of time")
    }
    assert rows["absent", "forward"]["status"] == "unavailable"


def test_without_a_truth_nothing_is_timed(monkeypatch, tmp_path):
    code, rows = bench(square_op(lambda x: x * x, truth=broken), monkeypatch, tmp_path)
    assert code == 1
    reason = "RuntimeError: nothing to check against: ValueError: out of luck and of lines"
    found = {(r["contender"], r["status"], r["reason"]) for r in rows.values()}
    assert found == {("reference", "error", reason), ("eager", "unavailable", reason)}


def test_errors_are_found_in_every_piece(monkeypatch):
    """Large results are compared piece by piece."""
    monkeypatch.setattr(harness, "CHUNK", 8)
    exact = torch.zeros(5, 4, dtype=torch.float64)
    for i in (0, 2, 4):
        value = torch.zeros(5, 4)
        value[i, 3] = 0.5
        assert harness._error(value, exact) == 0.5
        value[i, 3], value[3, 0] = torch.nan, 9.0
        assert math.isnan(harness._error(value, exact))
    assert harness._error(torch.tensor(2.0), torch.tensor(1.5, dtype=torch.float64)) == 0.5


def test_resumed_after_what_is_there(monkeypatch, tmp_path):
    """Cases with a result are not measured again; ratios include old and new results."""
    op = square_op(lambda x: x * x)
    _, first = bench(op, monkeypatch, tmp_path, "--peers", "none")
    assert {name for name, _ in first} == {"reference"}
    code, rows = bench(dataclasses.replace(op, call=broken), monkeypatch, tmp_path, "--resume")
    assert code == 0 and {name for name, _ in rows} == {"reference", "eager"}
    ours = rows["reference", "forward"]
    assert ours["median_ms"] == first["reference", "forward"]["median_ms"]
    ratio = rows["eager", "forward"]["median_ms"] / ours["median_ms"]
    assert ours["times_faster_than"] == {"eager": pytest.approx(ratio)}


def test_ratios_and_rates(monkeypatch, tmp_path):
    _, rows = bench(square_op(lambda x: x * x), monkeypatch, tmp_path)
    ours, eager = rows["reference", "forward"], rows["eager", "forward"]
    ratio = eager["median_ms"] / ours["median_ms"]
    assert ours["times_faster_than"] == {"eager": pytest.approx(ratio)}
    assert ours["rate"] == pytest.approx(2 * 4 * 8 * 4 / (ours["median_ms"] * 1e-3) / 1e9)


def test_work_is_counted_as_documented():
    """Calculated by hand: 16 x 1024 x 12 x 64, and GPT-2's logits in bfloat16."""
    import attention
    import cross_entropy
    import layer_norm

    s = Shape(B=16, T=1024, H=12, D=64)
    forward, backward = (attention.work(s, step, 2) for step in ("forward", "backward"))
    assert forward.amount == 2 * 16 * 12 * 1024 * 1024 * 64
    assert backward.amount == 2.5 * forward.amount
    gpu = torch.device("cuda")
    assert forward.rate(0.1, gpu) == pytest.approx(257.7, rel=1e-3)  # in 100 us: 258 TFLOP/s
    assert forward.unit(gpu) == "TFLOP/s"
    s = Shape(N=65536, C=768)
    fused = layer_norm.OPS[1].work(s, "forward", 2)
    assert fused.rate(0.099, gpu) == pytest.approx(4067, rel=1e-3)  # design's 99 us: 4.1 TB/s
    s = Shape(N=8192, V=50257, C=768)
    logits, head = (op.work(s, "forward+backward", 2).amount for op in cross_entropy.OPS)
    assert logits == 3 * 8192 * 50257 * 2 and head == 6 * 8192 * 50257 * 768


def test_cpu_clock_takes_turns():
    order = []
    ticks = clock.Clock(torch.device("cpu"), quick=True)
    ticks.sample_s = 0  # one run per sample
    times = ticks({name: (lambda name=name: order.append(name), nullcontext) for name in "ab"})
    assert "".join(order[4:]) == "abba" * 3 + "ab"
    assert all(t["p20_ms"] <= t["median_ms"] <= t["p80_ms"] for t in times.values())
    order.clear()
    ticks.slow_s = 0
    ticks({name: (lambda name=name: order.append(name), nullcontext) for name in "ab"})
    assert "".join(order[4:]) == "abbaab", "three rounds of what is slow"


def test_peak_memory_of_a_cpu_is_what_was_resident_at_most(monkeypatch):
    device = torch.device("cpu")
    if (peak := clock.peak_memory(lambda: torch.ones(2**24), device)) is None:
        pytest.skip("this system does not tell")
    assert abs(peak - 2**26) < 2**23
    kept = torch.ones(2**24)
    assert clock.peak_memory(lambda: kept.add_(1), device) < 2**23
    monkeypatch.setattr(clock.Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError()))
    assert clock.peak_memory(lambda: 1 / 0, device) is None


@pytest.mark.full
def test_regression_subset_runs():
    pytest.importorskip("pytest_benchmark")
    done = run(
        "-m", "pytest", "--benchmark-only", "benchmarks/", "-k", "gelu-forward",
        "-p", "no:cacheprovider", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_speed[gelu-forward-reference]" in done.stdout
