"""benchmarks/host.py times every op and its parts, and its stub driver launches nothing.

Times are never tested, because a loaded machine would fail the test.
"""

import gc
import json
import time
from contextlib import contextmanager, nullcontext

import host
import pytest
import table
import torch
from bench.contenders import Contender, Wrong
from bench.host.host_clock import HostClock
from bench.host.ops import Op
from bench.host.parts import nested_calls, parts, summed
from bench.host.tables import BOTH, FORWARD, PARTS, WITH_GRAD
from processes import run

from gpt2 import kernels

CPU = torch.device("cpu")
# Other functions of gpt2.kernels than ops: quantize_int8 is called once per model.
NO_OPS = {"BACKENDS", "BackendUnavailable", "quantize_int8", "report", "use",
          "why_not"}  # fmt: skip
LAUNCHES = {  # Triton kernels launched by a forward, and with the backward
    "layer_norm": (1, 3),
    "add_layer_norm": (1, 3),
    "gelu": (1, 2),
    "bias_gelu": (1, 3),
    "causal_attention": (1, 3),
    "causal_attention_qkv": (1, 3),
    "cross_entropy": (1, 2),
    "linear_cross_entropy": (1, 1),  # the forward replaces the logits by the gradient
    "decode_attention": (2,),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory, request):
    """host.py's output and results on a CPU."""
    if not request.config.getoption("--full"):
        pytest.skip("runs with --full")
    path = tmp_path_factory.mktemp("host") / "host.json"
    command = "benchmarks/host.py", "--device", "cpu", "--quick", "--json", path
    done = run(*command, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.fixture
def backends(quick):
    """The backends that could be timed here: a compiler or Triton may be missing."""
    found = {r["contender"] for r in rows_of(quick, "step") if r["status"] == "ok"} - {"plain"}
    if not found:
        pytest.skip("neither the cpu backend nor the stub runs here")
    return found


def rows_of(quick, op):
    return [r for r in quick[1]["results"] if r["op"] == f"host_{op}"]


def test_every_op_has_a_row(quick, backends):
    names = [name for name in kernels.__all__ if name not in NO_OPS]
    stdout, document = quick
    ops, step, *apart = (block.splitlines() for block in stdout.split("\n\n")[1:])
    assert sorted(line.split()[0] for line in ops[1:]) == sorted(names)
    assert all(ops[0].count(backend) == 2 for backend in ("pytorch", *backends))
    assert [line.split("  ")[0] for line in step[1:]] == [
        "plain", *(f"fast, {name}" for name in ("cpu", "triton-stub") if name in backends)
    ]  # fmt: skip
    for lines, backend in zip(apart, [b for b in ("cpu", "triton-stub") if b in backends],
                              strict=True):  # fmt: skip
        assert lines[0].startswith(f"{backend}: a forward") and all(p in lines[0] for p in PARTS)
        served = {r["op"] for r in document["results"]
                  if r["contender"] == backend and r["status"] == "ok"}  # fmt: skip
        assert {f"host_{line.split()[0]}" for line in lines[1:]} >= served - {"host_step"}


def test_results_are_written(quick, backends):
    _, document = quick
    assert (document["schema"], document["script"], document["limits"]) == (1, "host", {})
    assert document["environment"]["threads"] == 1
    for name in LAUNCHES:
        steps = (FORWARD, WITH_GRAD, BOTH) if len(LAUNCHES[name]) == 2 else (FORWARD,)
        timed = [(r["step"], r["contender"]) for r in rows_of(quick, name) if r["median_ms"]]
        assert sorted(timed) == sorted((s, c) for s in steps for c in ("pytorch", *backends))
    for row in rows_of(quick, "layer_norm"):
        assert (row["max_error"] is None) == (row["contender"] == "triton-stub")
        assert row["times_faster_than"]["pytorch"] > 0 and row["p20_ms"] <= row["p80_ms"]
        assert list(row["details"].get("parts_us", PARTS[:1])) == list(
            PARTS if row["step"] == WITH_GRAD and row["kind"] == "backend" else PARTS[:1]
        )


def test_tables_of_the_documents(quick, backends):
    """docs/benchmarks.md has separate tables of host time, which is not in README's ratios."""
    shown = table.render([quick[1]])
    assert "**Host time**" in shown and "| layer_norm |" in shown and "| whole |" in shown
    assert "host_" not in shown and "layer_norm" not in table.summary([quick[1]])


def test_a_column_per_pass_and_contender():
    """Times are in microseconds; the ratio is ours to PyTorch's, so less is better."""

    def row(op, step, contender, ms, **more):
        kind = "backend" if contender in ("cpu", "triton-stub") else "peer"
        about = {"op": op, "step": step, "shape": {"T": 4}, "dtype": "float32", "status": "ok",
                 "contender": contender, "kind": kind, "details": {}}  # fmt: skip
        peer = "plain" if op == "host_step" else "pytorch"
        return about | {"median_ms": ms, "times_faster_than": {peer: 0.5}} | more

    small = {"n_layer": 12, "n_embd": 8, "vocab_size": 64}
    ops, step, where, nowhere = host.tables([
        row("host_gelu", FORWARD, "triton-stub", 1.5),
        row("host_gelu", FORWARD, "cpu", 2.0),
        row("host_gelu", FORWARD, "pytorch", 1.0, details={"parts_us": {PARTS[0]: 0.9}}),
        row("host_gelu", BOTH, "cpu", 8.0, details={"parts_us": {PARTS[0]: 3.0, PARTS[3]: 4.0}}),
        row("host_gelu", BOTH, "pytorch", 4.0),
        row("host_step", BOTH, "triton-stub", 5.0, details=small),
        row("host_step", BOTH, "cpu", 6.0, details=small),
        row("host_step", BOTH, "plain", 3.0, details=small, times_faster_than={"plain": 1.0}),
        row("host_linear", FORWARD, "cpu", None, status="unavailable"),
    ])  # fmt: skip
    contenders = "cpu", "triton-stub"
    assert ops == [
        ("µs, T=4, float32", "forward: pytorch", *contenders, "forward+backward: pytorch",
         *contenders),
        ("gelu", "1000.0", "2000.0 (2.00×)", "1500.0 (2.00×)", "4000.0", "8000.0 (2.00×)", ""),
    ]  # fmt: skip
    assert [(line[0], line[2]) for line in step[1:]] == [
        ("plain", "1.00×"), ("fast, cpu", "2.00×"), ("fast, triton-stub", "2.00×")
    ]  # fmt: skip
    assert len(nowhere) == 1  # the stub has no parts
    assert where == [
        ("cpu: a forward, µs, best", *PARTS, "whole", "pytorch"),
        ("gelu", "3.0", "", "", "4.0", "", "7.0", "0.9"),
    ]


def test_the_stub_launches_every_kernel(quick, backends):
    if "triton-stub" not in backends:
        pytest.skip(rows_of(quick, "gelu")[0]["reason"])
    for name, counts in LAUNCHES.items():
        found = {r["step"]: r["details"]["launches"] for r in rows_of(quick, name)
                 if r["contender"] == "triton-stub"}  # fmt: skip
        assert (found[FORWARD], *([found[BOTH]] if BOTH in found else [])) == counts, name
    (step,) = (r for r in rows_of(quick, "step") if r["contender"] == "triton-stub")
    # 12 layers of 2 norms, an attention and a GELU, the last norm, and the loss
    assert step["details"]["launches"] == 25 * 3 + 12 * 3 + 12 * 3 + 1


def test_the_stub_leaves_nothing_behind(quick, backends):
    """Afterwards Triton has its old driver again and refuses CPU tensors."""
    if "triton-stub" not in backends:
        pytest.skip(rows_of(quick, "gelu")[0]["reason"])
    code = """
import sys, torch
sys.path.insert(0, "benchmarks")
from bench.host import stub_driver
from triton.runtime import driver
from gpt2 import kernels
why_not = lambda: kernels.why_not("triton", "gelu", torch.device("cpu"), torch.float32)
before = why_not(), driver._active
with stub_driver.active():
    assert why_not() is None and driver.active.get_current_target().arch == 90
    kernels.gelu(torch.ones(8))
assert stub_driver.launches() == 1
assert "needs a CUDA tensor" in before[0] and (why_not(), driver._active) == before
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_parts_add_up():
    """No part is negative, even if noise makes an inner call slower than the outer."""
    assert parts({"a": 5.0, "b": 7.0, "c": 2.0}) == {"a": 0.0, "b": 3.0, "c": 2.0}
    times = dict(zip(PARTS, (0.020, 0.002, 0.010, 0.006, 0.005), strict=True))
    assert summed(times) == pytest.approx(dict(zip(PARTS, (8, 2, 4, 1, 5), strict=True)))
    del times["autograd function"]  # without gradients the raw op is directly inside
    assert summed(times) == pytest.approx(
        {"argument checks": 12, "dispatch": 2, "raw op": 1, "launcher": 5}
    )


def test_nested_calls_compute_the_same(accelerated):
    """Each call inside an op, made alone, returns the op's result."""
    x, weight, bias = torch.randn(4, 32), torch.randn(32), torch.randn(32)
    x.requires_grad_()
    with kernels.use(accelerated):
        y = kernels.layer_norm(x, weight, bias)
        choose, function, raw, launch = nested_calls(lambda: kernels.layer_norm(x, weight, bias))
        assert choose() is None and function().grad_fn is not None
        with torch.no_grad():
            assert all(torch.equal(found, y) for found in (function(), raw()[0], launch()[0]))
        q = torch.randn(1, 1, 2, 16)
        cache, lengths = torch.randn(1, 5, 2, 16), torch.tensor([3])
        calls = nested_calls(lambda: kernels.decode_attention(q, cache, cache, lengths))
        assert [call is None for call in calls] == [False, True, False, False]
        loss = x, torch.randn(8, 32), torch.tensor([0, 1, 2, -100])
        calls = nested_calls(lambda: kernels.linear_cross_entropy(*loss))
        total = kernels.linear_cross_entropy(*loss) * 3
        with torch.no_grad():
            assert all(torch.allclose(call()[0].sum(), total) for call in calls[2:])


def test_the_clock_takes_turns_without_the_collector():
    seen = []

    @contextmanager
    def context():
        seen.append("enter")
        yield
        seen.append("leave")

    clock = HostClock(CPU, quick=True)
    clock.rounds, clock.least_runs, clock.most_runs = 4, 1, 1
    runs = {name: (lambda name=name: seen.append((name, gc.isenabled())), context) for name in "ab"}
    times = clock(runs)
    assert gc.isenabled() and set(times) == {"a", "b"}
    assert {x[1] for x in seen if isinstance(x, tuple)} == {False}
    assert "".join(x[0] for x in seen if isinstance(x, tuple)) == 6 * "a" + 6 * "b" + 2 * "abba"
    assert seen[-6:-3] == ["enter", ("b", False), "leave"]
    assert clock.now is time.thread_time_ns  # of this thread only

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clock({"a": (fails, nullcontext)})
    assert gc.isenabled()


def test_another_op_is_not_timed(monkeypatch, tmp_path, capsys):
    """A contender whose result differs from PyTorch's fails the run; a late case is skipped."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(host, "measure_step", lambda *args: None)
    monkeypatch.setattr(host, "serving", lambda *args: (nullcontext, None))
    x = torch.randn(8, requires_grad=True)
    double = Op("double", "gelu", 0, lambda x: 2 * x, lambda x: 2.1 * x, [x])
    monkeypatch.setattr(host, "operations", lambda *args: [double])
    command = ["--device", "cpu", "--quick", "--backends", "cpu", "--json", tmp_path / "out.json"]
    assert host.main([*map(str, command)]) == 1
    assert "FAILED cpu host_double B=1 T=16 H=2 D=16: it is off by" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {r["status"] for r in rows if r["contender"] == "cpu"} == {"wrong"}
    assert host.main([*map(str, command), "--seconds", "1e-9"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {r["status"] for r in rows} == {"skipped"}


def test_the_stubs_results_are_not_compared():
    ones, zeros = [torch.ones(2)], [torch.zeros(2)]
    assert host.compared(Contender("triton-stub", None), ones, zeros) is None
    with pytest.raises(Wrong, match="off by 1"):
        host.compared(Contender("cpu", None), ones, zeros)
    with pytest.raises(Wrong, match="off by nan"):
        host.compared(Contender("cpu", None), [torch.full((2,), torch.nan)], zeros)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "cublas"], "'cublas' is not one of cpu, triton-stub, triton, cuda"),
        (["--backends", "triton"], "--backends triton: on cpu there is cpu, triton-stub"),
        (["--peers", "eager"], "'eager' is not one of pytorch, plain"),
        (["--plot", "out.png"], "--plot: host time is given in tables alone"),
        (["--shapes", "4x4"], "'4x4' is not BxTxHxD"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_bad_options_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as exit:
        host.main(["--device", "cpu", *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
