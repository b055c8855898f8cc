"""benchmarks/tune.py tries what it says: every candidate reaches the kernel, and is still right."""

import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import harness
import options
import tune

SHAPES = {"attention": "1x70x1x16", "layer_norm": "9x33", "gelu": "9x33", "cross_entropy": "3x99x8"}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it watches the interpreter")
TILE = ("BLOCK_M", "BLOCK_N", "ROWS", "BLOCK", "BLOCK_V", "num_warps", "num_stages")


@pytest.mark.parametrize("end", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("kernel", tune.SWEEPS)
def test_a_candidate_reaches_the_kernel(kernel, end, monkeypatch):
    sweep = tune.SWEEPS[kernel]
    op = tune.candidates(sweep)
    contender = list(op.peers(torch.device("cpu")))[end]
    launches = set()
    run = GridExecutor.__call__

    def spy(self, *args, **kwargs):
        tile = tuple(kwargs[name] for name in TILE if name in kwargs)
        launches.add((self.fn.__name__, tile))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    dims, shape = sweep.script.DIMS, SHAPES[op.kernel]
    inputs, grads = harness.draw(
        op, options.parse_shape(shape, dims), torch.device("cpu"), torch.float32
    )
    truth, bounds = harness.exact_and_bounds(op, inputs, grads)
    harness.check(op, contender, inputs, grads, truth, bounds)

    wanted = tuple(extent[end] for extent in sweep.extents)
    if kernel == "layer_norm_bwd":  # the last is the number of programs, not the kernel's to know
        wanted = wanted[:-1]
    part = kernel.removeprefix(op.kernel)  # "_fwd", "_bwd_dq", ...; nothing: all of its kernels
    tiles = {tile for name, tile in launches if part in name and "sum" not in name}
    assert tiles == {wanted}
    others = {tile for name, tile in launches if part not in name}
    assert wanted not in others, "the other kernels keep their own"


def test_more_programs_share_the_rows():
    now = tune.configs.resident_programs(torch.device("cpu"), 100)
    with tune.with_tile(tune.SWEEPS["layer_norm_bwd"].patches, (4, 4, 8)):
        programs = tune.triton_layer_norm.resident_programs(torch.device("cpu"), 100)
    assert programs == 2 * now


@pytest.mark.parametrize("argv", [[], ["attention"], ["--quick"]])
def test_an_unknown_kernel_is_one_line(argv, capsys):
    assert tune.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "KERNEL must be one of attention_fwd," in error


def test_every_candidate_has_its_row(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tune.main(["gelu", "--device", "cpu", "--shapes", "4x8", "--quick"]) == 0
    out = capsys.readouterr().out
    for row in ("* triton ", "(1024, 2) ", "(8192, 8) "):
        assert out.count(f"  {row}") + out.count(f"\n{row}") == 2, "forward and backward"
