"""The suite still notices each of the bugs in mutants_generation.py, mutants_sampling.py and
mutants_decode.py, planted one at a time in a copy of the package, as test_mutants.py does."""

import pytest
from mutants_decode import DECODE_MUTANTS
from mutants_generation import GENERATION_MUTANTS
from mutants_sampling import SAMPLING_MUTANTS
from test_mutants import as_built, assert_killed, cases, copy, plant, run_tests  # noqa: F401

# Their tests run on the cpu backend alone.
CPU_TESTS = ("cpu-avx2", "not_a_gpt_2", "under_autocast")

MUTANTS = cases((*GENERATION_MUTANTS, *SAMPLING_MUTANTS, *DECODE_MUTANTS))


@pytest.mark.triton
@pytest.mark.parametrize("mutant", MUTANTS)
def test_killed_in_generation(mutant, copy, as_built, monkeypatch):  # noqa: F811
    """That its test passes without it is seen where the test itself runs."""
    from conftest import why_no_cpu_kernels  # not above: a child imports the copy's

    needs_cpu = any(name in mutant.killed_by for name in CPU_TESTS)
    if needs_cpu and (reason := why_no_cpu_kernels("avx2")):
        pytest.skip(reason)
    plant(mutant, copy)
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch, as_built)
    assert_killed(mutant, status, log)
