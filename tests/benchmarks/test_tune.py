"""benchmarks/tune.py: every candidate reaches its kernel, and gives correct results."""

import pytest
import torch
import tune
from bench import harness, options
from triton.runtime.interpreter import GridExecutor

from gpt2 import kernels

SHAPES = {"attention": "1x70x1x16", "layer_norm": "9x33", "gelu": "9x33", "cross_entropy": "3x99x8"}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it watches the interpreter")
TILE = ("BLOCK_M", "BLOCK_N", "ROWS", "BLOCK_C", "BLOCK", "BLOCK_V", "num_warps", "num_stages",
        "STAGES")  # fmt: skip


@pytest.mark.parametrize("end", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("kernel", tune.SWEEPS)
def test_a_candidate_reaches_the_kernel(kernel, end, monkeypatch):
    sweep = tune.SWEEPS[kernel]
    op = tune.candidates(sweep)
    contender = list(op.peers(torch.device("cpu")))[end]
    dims, shape = sweep.script.DIMS, SHAPES[op.kernel]
    inputs, grads = harness.draw(
        op, options.parse_shape(shape, dims), torch.device("cpu"), torch.float32
    )
    truth, bounds = harness.exact_and_bounds(op, inputs, grads)
    now = harness.Contender("now", op.call, lambda: kernels.use("triton"))
    launches = {}
    run = GridExecutor.__call__

    def spy(self, *args, **kwargs):
        tile = tuple(kwargs[name] for name in TILE if name in kwargs)
        tiles.setdefault(self.fn.__name__, set()).add(tile)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    for one in (now, contender):
        tiles = launches[one] = {}
        harness.check(op, one, inputs, grads, truth, bounds)

    wanted = tuple(extent[end] for extent in sweep.extents)
    if kernel.endswith("layer_norm_bwd"):  # the last is the number of programs, the grid
        wanted = wanted[:-1]
    part = kernel.partition(op.kernel)[2]  # "_fwd", "_bwd_dq", ...; "": all kernels
    assert launches[contender].keys() == launches[now].keys()
    for name, used in launches[contender].items():
        if part in name and "sum" not in name:
            assert used == {wanted}
        elif part not in name:
            assert used == launches[now][name], "the other kernels keep their own"


def test_more_programs_share_the_rows(monkeypatch):
    """The last number of a candidate sets the grid: programs per multiprocessor."""
    grids = []
    run = GridExecutor.__call__

    def spy(self, *args, **kwargs):
        grids.append((self.fn.__name__, self.grid))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    x, row = torch.randn(100, 8), torch.ones(8)
    for per_sm in (2, 16):
        with tune.with_tile(tune.SWEEPS["layer_norm_bwd"].patches, (1, 8, 4, 1, per_sm)):
            kernels.layer_norm(x.requires_grad_(), row, row).sum().backward()
    of_backward = [grid for name, grid in grids if name == "_layer_norm_bwd_kernel"]
    assert of_backward == [(2, 1, 1), (16, 1, 1)], "the interpreter stands for one multiprocessor"


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
