"""The order of the backends on a GPU: by measurement, and without building a library that was not
requested."""

import pytest
import torch
from small_library import change_source, needs_compiler

from gpt2 import kernels
from gpt2.kernels import dispatch
from gpt2.kernels.native import libraries, recipes

GPU = torch.device("cuda", 0)
ASKED = GPU, torch.bfloat16
GPU_OPS = [op for op in dispatch.OPS if op != "linear"]  # PyTorch's there


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that Triton and the cuda backend support, as far as dispatch can see. Call it with
    whether the cuda library is built."""
    monkeypatch.setattr(kernels.triton, "why_not", lambda *args: None)
    monkeypatch.setattr(kernels.native.cuda, "why_not", lambda *args: None)

    def with_library(built):
        monkeypatch.setattr(dispatch, "_built", {})
        monkeypatch.setattr(libraries, "unbuilt", lambda name: None if built else "not built: so")

    return with_library


def test_a_built_library_serves_what_it_is_faster_at(gpu):
    gpu(True)
    chosen = {op: dispatch.choose(op, *ASKED, 64) for op in GPU_OPS}
    faster = dict.fromkeys(("decode_attention", "linear_cross_entropy"), "cuda")
    assert chosen == dict.fromkeys(GPU_OPS, "triton") | faster


def test_a_library_that_is_not_built_is_not_asked(gpu, monkeypatch):
    gpu(False)
    monkeypatch.setattr(libraries, "load", lambda name: pytest.fail(f"{name} was asked for"))
    for op in GPU_OPS:
        assert dispatch.choose(op, *ASKED, 64) == "triton"


def test_the_choice_does_not_change_within_a_process(gpu, monkeypatch):
    """A library that is built meanwhile is used from the next process on: within a process the same
    call gives the same bits."""
    gpu(False)
    assert dispatch.choose("linear_cross_entropy", *ASKED) == "triton"
    monkeypatch.setattr(libraries, "unbuilt", lambda name: None)
    assert dispatch.choose("linear_cross_entropy", *ASKED) == "triton"


def test_a_faster_backend_that_cannot_serve_is_passed_over(gpu, monkeypatch):
    gpu(True)
    monkeypatch.setattr(kernels.native.cuda, "why_not", lambda *args: "not this dtype")
    assert dispatch.choose("linear_cross_entropy", *ASKED) == "triton"


def test_a_cpu_tensor_asks_no_library_for_gpus(monkeypatch):
    monkeypatch.setattr(libraries, "unbuilt", lambda name: pytest.fail(f"{name} was asked for"))
    for op in dispatch.OPS:
        dispatch.choose(op, torch.device("cpu"), torch.float32, 64)


# ---- the report


@pytest.fixture
def report(gpu, monkeypatch):
    """kernels.report() on the fixture's GPU, called with whether the library is built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels.triton, "import_error", lambda: None)

    def reported(built):
        gpu(built)
        return kernels.report()

    return reported


def test_the_report_says_what_a_library_would_be_faster_at(report, monkeypatch):
    """The report builds nothing."""
    monkeypatch.setattr(libraries, "load", lambda name: pytest.fail(f"{name} was asked for"))
    monkeypatch.setattr(
        kernels.native.cuda,
        "why_not",
        lambda op, *rest: "PyTorch's" if op == "linear" else pytest.fail(op),
    )
    table, _, advice = report(False).partition("\n\ncuda would be faster here (not built: so):\n")
    assert table.count("not built: so") == len(GPU_OPS)
    assert [line.split(":")[0].strip() for line in advice.splitlines()] == list(dispatch.FASTER)
    assert all(faster.measured in advice for faster in dispatch.FASTER.values())


def test_the_report_names_a_backend_that_would_be_built(report, monkeypatch):
    """The first call will build it: nothing is compared with Triton, which is not installed."""
    monkeypatch.setattr(kernels.triton, "why_not", lambda *args: "triton cannot be imported")
    monkeypatch.setattr(kernels.triton, "import_error", lambda: "triton cannot be imported")
    lines = report(False).splitlines()[3:]
    assert [line.split()[0] for line in lines] == list(dispatch.OPS), "no advice"
    assert all("  cuda, built first  " in line for line in lines if line.split()[0] != "linear")


def test_the_report_gives_no_advice_to_a_gpu_that_is_too_old(report, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for backend in (kernels.triton, kernels.native.cuda):
        monkeypatch.setattr(backend, "why_not", lambda *args: "this GPU has 7.5")
    text = report(False)
    assert "not built" not in text and text.count("this GPU has 7.5") >= 2 * len(GPU_OPS)


def test_the_report_names_what_a_built_library_serves(report):
    served = {line.split()[0]: line for line in report(True).splitlines()[3:]}
    assert list(served) == list(dispatch.OPS), "no advice"
    assert served["linear_cross_entropy"].split()[1] == "cuda"
    assert served["attention"].split()[1] == "triton"


# ---- what is built


class TestUnbuilt:
    """native.unbuilt returns the reason without building or loading."""

    pytestmark = needs_compiler

    def test_before_and_after_the_build(self, small):
        assert libraries.unbuilt("cpu") == "not built: python -m gpt2.kernels build"
        assert small.compiled() == 0
        libraries.build("cpu")
        assert libraries.unbuilt("cpu") is None and not libraries._reasons

    def test_what_a_build_lacks(self, small):
        """Even if a library of older sources exists."""
        libraries.build("cpu")
        change_source(small)
        small.without_compiler()
        assert "nonexistent" in libraries.unbuilt("cpu")

    def test_a_failed_build_is_not_asked_for_again(self, small):
        """load() raises the compiler's error; advice to build would send the user in a circle."""
        small.source.write_text("int x = nonsense;\n")
        assert libraries.load("cpu") is not None
        libraries._reasons.clear()
        assert libraries.unbuilt("cpu") is None

    def test_the_flag_of_the_command(self, small, monkeypatch):
        monkeypatch.setattr(recipes, "LIBRARIES", {"cuda": small.library})
        assert libraries.unbuilt("cuda") == "not built: python -m gpt2.kernels build --cuda"
