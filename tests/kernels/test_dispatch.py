"""The choice of a backend, and the ops under PyTorch's machinery."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from inputs import every_op, tensor
from processes import ROOT, run_python
from util import DEVICE, launches

from gpt2 import kernels
from gpt2.kernels import dispatch

OPS = list(every_op())


# ---- the choice


def test_every_public_op_is_tested_here():
    public = {name for name in kernels.__all__ if name.islower()} - {"report", "use", "why_not"}
    assert public - {"decode_attention", "linear", "linear_int8", "quantize_int8"} == set(OPS), (
        "they have test files of their own"
    )


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_serves_or_raises(op, accelerated, monkeypatch):
    call, inputs = every_op()[op]
    with kernels.use(accelerated), launches() as launched:
        call(*inputs)
    assert set(launched) == {accelerated}
    with kernels.use("reference"), launches() as launched:
        call(*inputs)
    assert not launched
    monkeypatch.setattr(dispatch._MODULES[accelerated], "why_not", lambda *args: "not today")
    reason = rf"{accelerated} cannot serve \w+: not today"
    with kernels.use(accelerated), pytest.raises(kernels.BackendUnavailable, match=reason):
        call(*inputs)


def test_without_a_library_one_line_speaks_for_every_op(monkeypatch):
    """Without a compiler each op printed its own warning, of two long lines."""
    reason = "no C++ compiler: none of c++, g++, clang++ is on PATH; set CXX"
    monkeypatch.setattr(kernels.native.cpu, "_library_reason", lambda: reason)
    for backend in (kernels.triton, kernels.native.cuda):
        monkeypatch.setattr(backend, "why_not", lambda *args: "not for this device")
    dispatch._said.clear()
    x = torch.randn(2, 3, 4)
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            kernels.gelu(x)
            kernels.layer_norm(x, torch.ones(4), torch.ones(4))
            kernels.cross_entropy(x, torch.zeros(2, 3).long())
    (warning,) = said
    line = warnings.formatwarning(
        warning.message, warning.category, warning.filename, warning.lineno
    )
    assert line == (
        f"gpt2.kernels:0: UserWarning: plain PyTorch computes in place of every kernel: {reason}\n"
    )


def test_fallback_says_so_once(monkeypatch):
    monkeypatch.setitem(dispatch.PRIORITY, "gelu", ("triton", "cuda", "cpu"))
    monkeypatch.setattr(kernels.triton, "why_not", lambda *args: "not today")
    monkeypatch.setattr(kernels.native.cuda, "why_not", lambda *args: "nor tomorrow")
    monkeypatch.setattr(kernels.native.cpu, "why_not", lambda *args: "nor today")
    dispatch._said.clear()
    with pytest.warns(UserWarning) as said:
        for _ in range(3):
            kernels.gelu(tensor(3))
    assert len(said) == 1
    message = (
        "gelu falls back to plain PyTorch (triton: not today; cuda: nor tomorrow; cpu: nor today)"
    )
    assert message in str(said[0].message)
    assert said[0].filename == __file__, "the warning points at the caller"


def test_use_nests_and_ends_with_its_block():
    with kernels.use("reference"):
        with pytest.raises(RuntimeError, match="inside"), kernels.use("triton"):
            assert dispatch.forced() == "triton"
            raise RuntimeError("inside")
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None


def test_unknown_backends_are_named():
    with (
        pytest.raises(
            ValueError, match="backend must be one of triton, cuda, cpu, reference, got 'tritn'"
        ),
        kernels.use("tritn"),
    ):
        pass


def test_backward_runs_where_the_forward_did(accelerated):
    """Also outside of the use() block, and on autograd's thread."""
    x = tensor(5).requires_grad_()
    with kernels.use(accelerated):
        y = kernels.gelu(x)
    with kernels.use("reference"), launches() as launched:
        y.sum().backward()
    assert launched == [accelerated]


def test_reasons_without_a_gpu():
    why = kernels.triton._device_reason.__wrapped__
    assert "needs a CUDA tensor, got one on mps" in why("mps", None)


@pytest.mark.parametrize(
    "capability, hip, reason",
    [
        ((7, 5), None, "needs compute capability 8.0 or newer, this GPU has 7.5"),
        ((9, 0), "6.0", "needs an NVIDIA GPU, this build of PyTorch is for ROCm"),
        ((8, 0), None, None),
    ],
)
def test_reasons_with_a_gpu(capability, hip, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kernels.triton._device_reason.__wrapped__("cuda", 0) == reason


def test_reason_for_a_dtype():
    reason = kernels.why_not("triton", "gelu", torch.device(DEVICE), torch.float64)
    assert "float64" in reason or "triton cannot be imported" in reason


def test_report_is_a_table():
    done = subprocess.run(
        [sys.executable, "-m", "gpt2.kernels"], capture_output=True, text=True, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table, _, replay = done.stdout.rpartition("\n\n")
    assert replay.startswith("replay of calls: ")
    lines = table.partition("\n\ncuda would be faster")[0].splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}")
    assert lines[2].split() == ["op", "served", "by", "triton", "cuda", "cpu", "reference"]
    assert [line.split()[0] for line in lines[3:]] == list(dispatch.OPS)
    rows = [re.split(r"\s{2,}", line) for line in lines[3:]]
    reasons = {row[0]: dict(zip(kernels.BACKENDS, row[2:], strict=True)) for row in rows}
    for op, served_by, *_ in rows:
        asked = (*dispatch._candidates(op, torch.device(DEVICE)), "reference")
        able = [b for b in asked if reasons[op][b] == "yes"]
        assert served_by.partition(", backward")[0] == able[0], op
    if DEVICE == "cuda":
        assert all(reasons[op]["cpu"] != "yes" for op in dispatch.OPS)
    else:
        native = kernels.why_not("cpu", "gelu", torch.device("cpu"), torch.float32) is None
        assert {served_by for _, served_by, *_ in rows} == {"cpu" if native else "reference"}
        assert all("needs a CUDA tensor, got one on cpu" in line for line in lines[3:])


def test_a_machine_without_triton():
    """The import works, the reason is reported, and the ops run as plain PyTorch."""
    done = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, warnings; from gpt2 import kernels\n"
        "kernels.native.cpu.why_not = lambda *args: 'not today'\n"
        "reason = kernels.triton._device_reason('cpu', None)\n"
        "assert 'triton cannot be imported' in reason, reason\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    kernels.gelu(torch.ones(3))\n"
        "assert 'triton cannot be imported' in str(said[0].message)\n"
        "print(kernels.report())",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    assert "triton cannot be imported" in done.stdout


# ---- PyTorch's machinery


def test_no_flush_to_zero_leaks_out(accelerated):
    assert float.fromhex("0x0.0000000000001p-1022") != 0
    with kernels.use(accelerated):
        for call, inputs in every_op().values():
            call(*inputs)
            assert torch.tensor(5e-324, dtype=torch.float64).item() != 0
            assert (torch.tensor(1e-45) * 1).item() != 0
