"""The suite must notice each bug of tests/tools/mutants, planted one at a time (planting.py)."""

import re
from collections import Counter

import pytest
from mutants.csrc_attention import ATTENTION_MUTANTS as CSRC_ATTENTION
from mutants.csrc_cuda import CUDA_MUTANTS
from mutants.csrc_linear import BLOCK_MUTANTS, LINEAR_MUTANTS
from mutants.csrc_rows import ROW_MUTANTS
from mutants.decode import DECODE_MUTANTS
from mutants.evaluate import EVALUATE_MUTANTS, HARNESS_MUTANTS
from mutants.generation import GENERATION_MUTANTS
from mutants.interop import INTEROP_MUTANTS
from mutants.kernels import KERNEL_MUTANTS
from mutants.recording import RECORDING_MUTANTS
from mutants.transformers import TRANSFORMERS_MUTANTS
from mutants.triton_attention import ATTENTION_MUTANTS
from planting import ROOT, as_built, assert_killed, cases, copy, plant, run_tests  # noqa: F401

KERNELS = (*ATTENTION_MUTANTS, *KERNEL_MUTANTS)
MODEL = (*GENERATION_MUTANTS, *DECODE_MUTANTS, *EVALUATE_MUTANTS, *RECORDING_MUTANTS)
THEIRS = (*INTEROP_MUTANTS, *TRANSFORMERS_MUTANTS)
CSRC = (*CSRC_ATTENTION, *CUDA_MUTANTS, *BLOCK_MUTANTS, *LINEAR_MUTANTS, *ROW_MUTANTS)
# Tests that run only on the cpu backend
CPU_TESTS = ("cpu-avx2", "not_a_gpt_2", "under_autocast", "test_recording")


def test_every_bug_can_be_planted():
    """The text of each mutant occurs once in its file, and the test that must notice it exists."""
    bugs = (*KERNELS, *MODEL, *HARNESS_MUTANTS, *THEIRS, *CSRC)
    texts = {path: (ROOT / path).read_text() for path in {m.file for m in bugs}}
    wrong = [m.name for m in bugs if m.old == m.new or texts[m.file].count(m.old) != 1]
    for mutant in bugs:
        file, _, test = mutant.killed_by.partition("::")
        name = test.partition("[")[0]
        if not re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M):
            wrong.append(f"{mutant.name}: no {name}")
    assert wrong == []
    assert not [key for key, n in Counter((m.name, m.file) for m in bugs).items() if n > 1]


@pytest.mark.triton
@pytest.mark.parametrize(
    "mutants",
    [
        pytest.param([m for m in KERNELS if m.quick], id="quick"),
        pytest.param(KERNELS, id="all", marks=pytest.mark.full),
    ],
)
def test_without_a_bug_all_pass(mutants, copy, monkeypatch):  # noqa: F811
    """Only for these mutants: for the others the test itself shows that it passes without the
    bug."""
    status, log = run_tests(copy, {m.killed_by for m in mutants}, monkeypatch)
    assert status == 0, log
    assert "skipped" not in log.lower(), log


@pytest.mark.triton
@pytest.mark.parametrize("mutant", cases(KERNELS))
def test_killed_in_kernels(mutant, copy, monkeypatch):  # noqa: F811
    plant(mutant, copy)
    assert_killed(mutant, *run_tests(copy, {mutant.killed_by}, monkeypatch))


@pytest.mark.triton
@pytest.mark.parametrize("mutant", cases((*MODEL, *HARNESS_MUTANTS, *THEIRS)))
def test_killed(mutant, copy, as_built, monkeypatch):  # noqa: F811
    skip_where_its_test_is_skipped(mutant)
    plant(mutant, copy)
    assert_killed(mutant, *run_tests(copy, {mutant.killed_by}, monkeypatch, as_built))


def skip_where_its_test_is_skipped(mutant):
    from backends import why_no_cpu_kernels  # imported late: a child imports the copy's module

    if mutant in THEIRS:
        pytest.importorskip("transformers")
    if mutant in HARNESS_MUTANTS:
        pytest.importorskip("lm_eval")
        pytest.importorskip("accelerate")
    needs_cpu = mutant in MODEL and any(name in mutant.killed_by for name in CPU_TESTS)
    if needs_cpu and (reason := why_no_cpu_kernels("avx2")):
        pytest.skip(reason)
