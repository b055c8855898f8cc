"""The tests must pass on a machine with a GPU, as far as a pretended GPU can show
(pretend_gpu.py)."""

import collections
import re
import subprocess
import sys

import cuda_backend
import pytest
from backends import EMULATE_TRITON, ON_GPU, our_kernels, why_no_cpu_kernels
from processes import TESTS
from util import environment

OPS = {"attention", "cross_entropy", "decode_attention", "gelu", "layer_norm"}
OPS |= {"linear_cross_entropy"}
# Tests that failed on a GPU because of their own assumptions, and similar tests.
ASSUMING = [
    "kernels/test_gpu.py",
    "kernels/test_attention.py::test_other_head_sizes_fall_back_with_a_reason",
    "kernels/test_attention_hazards.py::test_65536_heads",
    "kernels/test_attention_hazards.py::test_scores_of_minus_infinity",
    "kernels/test_dispatch.py::test_fallback_says_so_once",
    "kernels/test_dispatch.py::test_forced_backend_serves_or_raises",
    "generate/test_decoding.py::test_past_tokens_are_computed_once",
    "kernels/test_layer_norm.py::test_longer_rows_fall_back_with_a_reason",
    "model/test_model.py::test_fast_on_a_machine_that_cannot_says_so_and_works",
    "model/test_model.py::test_switching_is_one_attribute",
    "interop/test_transformers.py::test_generates_what_they_do[accelerated-beams]",
    "interop/test_transformers.py::test_generates_what_they_do[gpt2_kernels-static-left]",
]
# The emulator's test starts a process without a GPU; one of the slow training runs is enough.
QUICK = "not (emulator or on_course) or (on_course and triton and dtype0)"

pytestmark = pytest.mark.skipif(
    ON_GPU or EMULATE_TRITON, reason="pretends a GPU where there is none"
)


@pytest.fixture(autouse=True)
def native_library():
    """Requires the kernels of csrc/cpu, which replace the GPU's. This is not a mark, because make
    sanitize need not run these tests again."""
    if reason := why_no_cpu_kernels(""):
        pytest.skip(reason)


def run(*arguments):
    """Run pytest on a pretended GPU, and return its report."""
    env = environment(OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-p", "no:cacheprovider",
         "-p", "no:xdist", *arguments],
        cwd=TESTS, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.long
def test_tests_of_a_gpu_pass():
    """56 tests failed on an H200, none because of a kernel: 0-dimensional losses were viewed as
    bytes, 12 heads did not divide a width of 256, and cuda computed where a fallback was
    expected."""
    pytest.importorskip("transformers", minversion="5.4")
    said = run(*ASSUMING, "-k", QUICK, "-rps")
    passed = collections.Counter(re.findall(r"^PASSED (?:tests/)?(\w+/test_\w+\.py)::", said, re.M))
    assert passed["kernels/test_gpu.py"] >= 45, said
    assert set(passed) == {test.partition("::")[0] for test in ASSUMING}, said
    reasons = set(re.findall(r"SKIPPED \[\d+\] [^ ]+ (.*)", said))
    assert reasons == {"runs with --full", "the tests' tensors are on the GPU"}, said


@pytest.mark.full
def test_every_op_is_collected_on_both_backends():
    said = run(".", "--collect-only", "--ignore=tools/test_pretend_gpu.py")
    found = re.findall(r"^(?:tests/)?kernels/test_(\w+)\.py::\w+\[(triton|cuda)\b", said, re.M)
    assert {(op, b) for op in OPS for b in ("triton", "cuda")} <= set(found), said


@pytest.mark.cuda_kernels
def test_the_sanitizer_s_expression_finds_our_kernels():
    ours = re.compile(our_kernels())
    assert cuda_backend.why_not() is None
    names = [*cuda_backend.emulated_kernels, "_attn_fwd_kernel", "_layer_norm_bwd_kernel"]
    assert len(names) > 100 and all(map(ours.search, names))
    others = ("_ZN2at6native29vectorized_elementwise_kernelILi4E", "vectorized_layer_norm_kernel")
    assert not any(map(ours.search, others))
