"""Every Triton kernel, compiled for GPUs that this machine need not have: it compiles, does not
spill, stays within its budget, and uses tensor cores for matrix products. The table is printed.

The kernels are compiled in another process, without the interpreter.
"""

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT
from util import DTYPES

from gpt2.kernels.triton import HEAD_SIZES, tiles

pytestmark = pytest.mark.triton

SCRIPT = ROOT / "tests" / "tools" / "compile_kernels.py"
# Bytes of shared memory per program: available on every GPU from compute capability 8.0 on, and on
# Hopper, for the tiles that tiles.py reserves for it.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
REGISTERS = 64 * 1024  # of an SM
PROGRAMS = {  # concurrent programs per SM
    "attention": 1,
    "decode_attention": 2,
    "layer_norm": 1,
    "gelu": 4,
    "cross_entropy": 2,
}


def compiled(tmp_path, capsys, *args):
    table = tmp_path / "kernels.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", table, *args], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    return json.loads(table.read_text())


def check(rows, op):
    assert rows
    for row in rows:
        what = f"{row['kernel']} for sm_{row['arch']}, {row['dtype']}, {row['size']}: {row}"
        threads = 32 * int(row["tile"].partition("num_warps=")[2].partition(",")[0])
        assert row["spills"] == 0 and row["stack"] == 0, f"spills: {what}"
        assert row["shared"] <= SHARED[row["arch"]], f"shared memory: {what}"
        programs = PROGRAMS[op]
        if row["kernel"] == "_bias_gelu_bwd_kernel":
            programs = tiles.bias_gelu_residents(DTYPES[row["dtype"]]).per_sm
        assert row["reg"] * threads * programs <= REGISTERS, f"registers: {what}"
        if op != "attention" or row["dtype"] == "fp32":
            assert row["mma"] == 0, f"no tensor core computes in true float32: {what}"
        else:
            assert row["mma"] > 0, f"no matrix instruction: {what}"
            if row["arch"] == 90 and row["size"] == 64:
                assert row["wgmma"] == row["mma"], f"not Hopper's matrix instructions: {what}"


# Matrix instructions and tiles differ between the architectures, so attention is compiled for both;
# float16 has the tiles of bfloat16. Kernels without matrix instructions have the same code for
# both, and are compiled once.
CASES = [
    ("attention", "80", "bf16"),
    ("attention", "90", "bf16"),
    ("attention", "90", "fp16"),
    ("attention", "80", "fp32"),
    ("decode_attention", "80", "fp32 bf16 fp16"),
    ("layer_norm", "80", "fp32 bf16 fp16"),
    ("gelu", "80", "fp32 bf16 fp16"),
    ("cross_entropy", "80", "fp32 bf16 fp16"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    "op, arch, dtypes",
    [pytest.param(*c, marks=() if c[0] == "gelu" else pytest.mark.full) for c in CASES],
)
def test_every_kernel(op, arch, dtypes, tmp_path, capsys):
    """Kernel x configuration x dtype."""
    rows = compiled(tmp_path, capsys, "--op", op, "--arch", arch, "--dtype", *dtypes.split())
    if op == "attention":  # forward, dq, dk dv, with and without dropout; dq, dk dv with sums
        rows = [row for row in rows if row["kernel"] != "_sum_partial_kernel"]
        assert len(rows) == 8 * len(HEAD_SIZES)
    check(rows, op)
