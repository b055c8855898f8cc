"""Times tile candidates of one Triton kernel against the tile in tiles.py.

    python benchmarks/tune.py attention_fwd --shapes 16x1024x12x64,4x4096x12x64 --dtype bfloat16
    python benchmarks/tune.py layer_norm_bwd --json out.json

The candidates are listed as peers: each is checked against float64 before it is timed, and the
fastest comes first in its table; "triton" is the present tile. A candidate that does not compile,
or needs more shared memory than the GPU has, is reported with that reason. A candidate's name is
its values for the fields of tiles.py's tuple, in order. The options after the kernel are those of
the other scripts. A winner goes into tiles.py with its reason, its measurement into docs/log.md.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import attention
import cross_entropy
import gelu
import layer_norm
from bench import harness
from bench.harness import Contender

from gpt2 import kernels
from gpt2.kernels.triton import attention as triton_attention
from gpt2.kernels.triton import cross_entropy as triton_cross_entropy
from gpt2.kernels.triton import gelu as triton_gelu
from gpt2.kernels.triton import layer_norm as triton_layer_norm
from gpt2.kernels.triton import tiles


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One kernel's candidates: all combinations of `extents`, the values of each field.
    `patches(candidate)` gives the module attributes to replace."""

    script: object
    op: int  # index of the kernel's operation in the script's OPS
    extents: tuple[tuple[int, ...], ...]
    patches: Callable


def attention_tile(kernel: str) -> Callable:
    def patches(candidate):
        now = tiles.attention_config

        def chosen(name, *rest):
            return tiles.AttentionTile(*candidate) if name == kernel else now(name, *rest)

        return triton_attention, {"attention_config": chosen}

    return patches


def norm_tile(kernel: str) -> Callable:
    """Candidates: (ROWS, BLOCK_C, num_warps) for a forward, also num_stages and per_sm for a
    backward."""

    def patches(candidate):
        now = tiles.layer_norm_config
        tile = tiles.RowTile(*candidate)

        def chosen(name, C):
            return tile if name == kernel else now(name, C)

        return triton_layer_norm, {"layer_norm_config": chosen}

    return patches


def cross_entropy_tile(kernel: str) -> Callable:
    def patches(candidate):
        now = tiles.cross_entropy_config

        def chosen(name):
            return tiles.VocabularyTile(*candidate) if name == kernel else now(name)

        return triton_cross_entropy, {"cross_entropy_config": chosen}

    return patches


def constants(module, *names: str) -> Callable:
    return lambda candidate: (module, dict(zip(names, candidate, strict=True)))


WARPS, STAGES = (4, 8), (1, 2, 3, 4)
NORM_BWD = (1, 2, 4), (256, 512), WARPS, STAGES[:3], (2, 3, 4)
SWEEPS = {
    "attention_fwd": Sweep(attention, 0, ((64, 128), (32, 64, 128), WARPS, STAGES[1:]),
                           attention_tile("fwd")),
    "attention_bwd_dq": Sweep(attention, 0, ((64, 128), (32, 64, 128), WARPS, STAGES[:3]),
                              attention_tile("bwd_dq")),
    "attention_bwd_dkdv": Sweep(attention, 0, ((32, 64, 128), (64, 128), WARPS, STAGES[:3]),
                                attention_tile("bwd_dkdv")),
    "layer_norm_fwd": Sweep(layer_norm, 0, ((1, 2, 4, 8), (256, 512, 1024), (1, 2, 4, 8)),
                            norm_tile("fwd")),
    "layer_norm_bwd": Sweep(layer_norm, 0, NORM_BWD, norm_tile("bwd")),
    "add_layer_norm_bwd": Sweep(layer_norm, 1, NORM_BWD, norm_tile("bwd")),
    "gelu": Sweep(gelu, 0, ((1024, 2048, 4096, 8192), (2, 4, 8)),
                  constants(triton_gelu, "GELU_BLOCK", "GELU_WARPS")),
    **{
        f"cross_entropy_{kernel}": Sweep(
            cross_entropy, 0, ((1024, 2048, 4096, 8192, 16384), (4, 8, 16)),
            cross_entropy_tile(kernel),
        )
        for kernel in ("fwd", "bwd")
    },
}  # fmt: skip


@contextlib.contextmanager
def with_tile(patches: Callable, candidate: tuple[int, ...]) -> Iterator[None]:
    """A context in which the Triton backend runs with this candidate."""
    module, names = patches(candidate)
    with kernels.use("triton"), mock.patch.multiple(module, **names):
        yield


def candidates(sweep: Sweep) -> harness.Op:
    """The operation with the candidates as its peers."""
    op = sweep.script.OPS[sweep.op]

    def peers(device):
        for candidate in itertools.product(*sweep.extents):
            yield Contender(
                str(candidate), op.call,
                lambda candidate=candidate: with_tile(sweep.patches, candidate),
            )  # fmt: skip

    return dataclasses.replace(op, peers=peers)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in SWEEPS:
        if argv and argv[0] in ("-h", "--help"):
            print(__doc__)
            return 0
        got = repr(argv[0]) if argv else "nothing"
        print(f"tune.py: error: KERNEL must be one of {', '.join(SWEEPS)}, got {got}",
              file=sys.stderr)  # fmt: skip
        return 2
    sweep = SWEEPS[argv[0]]
    shapes, dims = sweep.script.SHAPES, sweep.script.DIMS
    only_triton = ["--backends", "triton", *argv[1:]]
    return harness.main([candidates(sweep)], doc=__doc__, dims=dims, shapes=shapes,
                        argv=only_triton)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
