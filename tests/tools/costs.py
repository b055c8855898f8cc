"""Counts the costs of each kernel at GPT-2's sizes with the emulator: a performance check without a
GPU. tests/tools/costs.json holds the counts; tests/builds/test_costs.py compares them.

    python tests/tools/costs.py [cuda|triton] [--record]     # prints them; --record writes them

Per launch it counts warp instructions, bytes of global memory read and written, mma, barriers, and
bank conflicts (wavefronts beyond the possible minimum). Batches are small: the cost of a row does
not depend on their size.
"""

import argparse
import collections
import json
import os
import sys
from pathlib import Path

import pytest
import torch

RECORDED = Path(__file__).with_name("costs.json")
COUNTED = ("warp_instructions", "global_bytes_read", "global_bytes_written", "mma", "barriers",
           "bank_conflicts")  # fmt: skip


def run_every_kernel(kernels) -> None:
    def randn(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape).to(dtype).requires_grad_()

    def backward(y):
        y.backward(torch.ones_like(y))

    row = randn(768, dtype=torch.float32)
    backward(kernels.causal_attention_qkv(randn(1, 256, 3 * 128), 2))
    backward(kernels.layer_norm(randn(64, 768), row, row))
    backward(kernels.add_layer_norm(randn(64, 768), randn(64, 768), row, row)[0])
    stream = randn(64, 768).float().requires_grad_()  # as under autocast
    backward(kernels.add_layer_norm(randn(64, 768), stream, row, row)[0])
    backward(kernels.gelu(randn(16, 3072)))
    backward(kernels.bias_gelu(randn(16, 3072), randn(3072)))
    targets = torch.arange(4)
    backward(kernels.cross_entropy(randn(4, 50257), targets))
    backward(kernels.linear_cross_entropy(randn(4, 16), randn(50257, 16), targets))


def count(backend: str) -> dict[str, dict[str, int]]:
    """Costs by kernel name, numbered if a kernel is launched more than once."""
    from backends import serving
    from emulation import readable

    from gpt2 import kernels

    torch.manual_seed(0)
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(backend, patch, banks=True) as device,
        kernels.use(backend),
    ):
        run_every_kernel(kernels)
        if backend == "cuda":  # Triton has no kernel for it
            q, cache = torch.randn(1, 1, 2, 64), torch.randn(1, 512, 2, 64)
            kernels.decode_attention(q, cache, cache, torch.tensor([512]))
    found, times = {}, collections.Counter()
    for launch in device.launches:
        name = readable(launch.kernel.name)
        times[name] += 1
        costs = {key: getattr(launch.counts, key) for key in COUNTED}
        found[f"{name} {times[name]}" if times[name] > 1 else name] = costs
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", nargs="?", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name}")
    options = parser.parse_args()
    if options.backend == "triton":
        os.environ["GPT2_TEST_TRITON"] = "emulator"
        os.environ.pop("TRITON_INTERPRET", None)  # triton is imported as a compiler
    costs = count(options.backend)
    if options.record:
        recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        recorded[options.backend] = costs
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(json.dumps(costs, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
