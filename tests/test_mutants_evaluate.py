"""The suite still notices each of the bugs in mutants_evaluate.py, planted one at a time in a copy
of the package, as test_mutants.py does."""

import pytest
from mutants_evaluate import EVALUATE_MUTANTS, HARNESS_MUTANTS
from test_mutants import as_built, assert_killed, cases, copy, plant, run_tests  # noqa: F401

MUTANTS = cases(EVALUATE_MUTANTS + HARNESS_MUTANTS)


@pytest.mark.triton
@pytest.mark.parametrize("mutant", MUTANTS)
def test_killed_in_evaluation(mutant, copy, as_built, monkeypatch):  # noqa: F811
    """That its test passes without it is seen where the test itself runs."""
    if mutant in HARNESS_MUTANTS:
        pytest.importorskip("lm_eval")
        pytest.importorskip("accelerate")
    plant(mutant, copy)
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch, as_built)
    assert_killed(mutant, status, log)
