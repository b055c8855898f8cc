"""The suite still notices each of the bugs in mutants_interop.py and mutants_transformers.py,
planted one at a time in a copy of the package, as test_mutants.py does."""

import pytest
from mutants_interop import INTEROP_MUTANTS
from mutants_transformers import TRANSFORMERS_MUTANTS
from test_mutants import as_built, assert_killed, cases, copy, plant, run_tests  # noqa: F401

MUTANTS = cases((*INTEROP_MUTANTS, *TRANSFORMERS_MUTANTS))


@pytest.mark.triton
@pytest.mark.parametrize("mutant", MUTANTS)
def test_killed_in_interop(mutant, copy, as_built, monkeypatch):  # noqa: F811
    """That its test passes without it is seen where the test itself runs."""
    pytest.importorskip("transformers")
    plant(mutant, copy)
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch, as_built)
    assert_killed(mutant, status, log)
