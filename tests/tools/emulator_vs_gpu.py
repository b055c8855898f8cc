"""The cuda backend's results for fixed inputs, on a GPU or on the emulator, whichever runs it here.

CUDA_VISIBLE_DEVICES= python tests/tools/emulator_vs_gpu.py FILE.safetensors     # the emulator's
"""

import sys

import cuda_backend
import pytest
import torch
from safetensors.torch import save_file

from gpt2 import kernels

# Results without approximations: a maximum, and the probabilities that dropout kept.
EXACT = ("maximum", "kept")


def results(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    found = {}

    def run(name, f, *inputs):
        y = f(*inputs)
        found[name] = y.detach()
        for i, gradient in enumerate(torch.autograd.grad(y.float().square().sum(), inputs)):
            found[f"{name}, gradient {i}"] = gradient

    with kernels.use("cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            qkv, row = randn(2, 130, 3 * 128, dtype=dtype), randn(769)
            run(f"attention {name}", lambda x: kernels.causal_attention_qkv(x, 2), qkv)
            run(f"layer_norm {name}", kernels.layer_norm, randn(5, 769, dtype=dtype), row, row)
            run(f"bias_gelu {name}", kernels.bias_gelu, randn(5, 769, dtype=dtype), randn(769))
            targets = torch.arange(4, device=device)
            logits = randn(4, 257, dtype=dtype)
            run(f"cross_entropy {name}", lambda x, t=targets: kernels.cross_entropy(x, t), logits)
        logits, targets = logits.detach(), targets.to(torch.int64)
        library = torch.ops.gpt2_kernels_cuda
        found["maximum"] = library.cross_entropy_fwd(logits, targets, -1, 0.0)[1][0]
        # Values that identify the keys: o is 0 in each column whose key was dropped.
        q, v = torch.zeros(2, 1, 64, 1, 64, device=device)
        v[0, :, 0] = torch.eye(64, device=device)
        o = kernels.causal_attention(q, q, v, dropout_p=0.5, seed=7)
        found["kept"] = (o != 0).to(torch.uint8)
    return {name: x.detach().cpu().clone() for name, x in found.items()}


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, cuda_backend.serving(patch):
        save_file(results("cuda" if cuda_backend.ON_GPU else "cpu"), sys.argv[1])
