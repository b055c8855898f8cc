"""Triton's kernels compiled for sm_80: their PTX runs on the emulator, through the package's own
launchers, in the same tests that the interpreter passes.

Each part runs in another process, because the first import of Triton decides whether it interprets
or compiles.
"""

import re
import subprocess
import sys

import pytest
from backends import EMULATE_TRITON, ON_GPU
from emulation import FILE, emulation
from processes import TESTS
from util import environment

ONE_OF_EACH = [
    "kernels/test_attention.py::test_packed[triton-1-65-3-D64-bf16-]",
    "kernels/test_layer_norm.py::test_add_layer_norm[triton-C768-N5-bf16-fp32]",
    "kernels/test_layer_norm.py::test_layer_norm[triton-C769-N3-fp16-same]",
    "kernels/test_gelu.py::test_gelu[triton-1.0-2049-bf16]",
    "kernels/test_gelu.py::test_bias_gelu[triton-N5-C1025-fp32-same]",
    "kernels/test_decode_attention.py::test_decode[triton-B3-T257-D64-bf16]",
    "kernels/test_cross_entropy.py::test_cross_entropy[triton-1.0-V257-N3-bf16-some]",
    "kernels/test_cross_entropy.py::test_in_place_rows_touch_nothing_else[triton-33-bf16]",
]
ATTENTION = ["kernels/test_attention.py", "kernels/test_attention_hazards.py"]
OTHERS = "not bf16 and not fp16 and not fp32"
PARTS = {
    "one-of-each": ONE_OF_EACH,
    **{f"attention-{k}": [*ATTENTION, "-k", k] for k in ("bf16", "fp16", "fp32", OTHERS)},
    "cross_entropy": [
        "kernels/test_cross_entropy.py",
        "kernels/test_cross_entropy_rows.py",
        "kernels/test_linear_cross_entropy.py",
    ],
    **{op: [f"kernels/test_{op}.py"] for op in ("layer_norm", "gelu", "decode_attention")},
}


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.skipif(ON_GPU or EMULATE_TRITON, reason="the other tests run the compiled kernels")
@pytest.mark.parametrize(
    "part",
    [pytest.param(p, marks=() if p == "one-of-each" else pytest.mark.full) for p in PARTS],
)
def test_compiled_kernels(part, tmp_path, request):
    env = environment(GPT2_TEST_TRITON="emulator", **{FILE: str(tmp_path / "emulation")})
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *PARTS[part], "--full", "-p", "no:cacheprovider"],
        cwd=TESTS, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counts = re.search(r"^triton .*: (\d+) cases, (\d+) results", result.stdout, re.M)
    assert counts is not None, result.stdout
    emulation.add_file(tmp_path / "emulation")
    request.node.user_properties.append(("elsewhere", ("triton-ptx", *map(int, counts.groups()))))
