"""Compiles every Triton kernel for GPUs that this machine need not have, and prints its costs.

    python tests/tools/compile_kernels.py [--arch 80 90] [--op attention ...] [--dtype bf16 ...]
                                    [--head-size 64 ...] [--json FILE]

The package's own launchers run on small CPU tensors, and every launch becomes a compilation for the
target. So each kernel is compiled as it would be called, with its tile, its stages and Triton's
specialisations of the arguments. The cubin gives the registers, stack (with spills), shared memory
and tensor-core instructions.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gpt2.kernels.block import SUM_FEATURES
from gpt2.kernels.triton import (
    HEAD_SIZES,
    attention,
    cross_entropy,
    decode_attention,
    gelu,
    layer_norm,
    tiles,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPS = ("attention", "decode_attention", "layer_norm", "gelu", "cross_entropy")
ROW_LENGTHS = (768, 1600, 8192)  # widths of GPT-2 and XL, and the longest row of the kernels


class _Target:
    """Replaces Triton's GPU driver. The device number is the architecture: Triton caches kernels
    per device, so each architecture has its own cache."""

    arch = 90

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


class CompileOnly:
    """A context in which launching a kernel compiles it for `arch` and adds it to `compiled`."""

    def __init__(self, arch: int):
        self.arch, self.compiled = arch, {}

    def __enter__(self):
        self.launch = launch = JITFunction.run

        def compile_instead(kernel, *args, grid, warmup, **kwargs):
            binary = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            tile = {k: v for k, v in kwargs.items() if k not in ("D", "C", "PRECISION")}
            if any(arg is None for arg in args):  # an optional result is left out
                tile["LEAN"] = True
            self.compiled[kernel.fn.__name__, tuple(tile.items())] = binary

        JITFunction.run = compile_instead
        self.is_hopper = tiles.is_hopper
        tiles.is_hopper = lambda device: self.arch == 90
        target = _Target()
        target.arch = self.arch
        triton.runtime.driver.set_active(target)
        return self.compiled

    def __exit__(self, *exc):
        JITFunction.run = self.launch
        tiles.is_hopper = self.is_hopper


def launch_attention(dtype: torch.dtype, D: int) -> None:
    qkv = torch.zeros(1, 128, 3 * D, dtype=dtype)
    o, lse = torch.zeros(1, 128, D, dtype=dtype), torch.zeros(1, 1, 128)
    for dropout_p, seed in ((0.0, None), (0.1, torch.zeros(1, dtype=torch.int64))):
        attention.attention_qkv_fwd(qkv, 1, 0.125, dropout_p, seed)
        attention.attention_qkv_bwd(o, qkv, o, lse, 1, 0.125, dropout_p, seed)
    attention.attention_qkv_bwd(o, qkv, o, lse, 1, 0.125, 0.0, None, torch.float32)


def launch_decode_attention(dtype: torch.dtype, D: int) -> None:
    cache = torch.zeros(2, 512, 2, D, dtype=dtype)
    lengths = torch.ones(2, dtype=torch.int64)
    decode_attention.decode_attention(cache[:, :1], cache, cache, lengths, 0.125)


def launch_layer_norm(dtype: torch.dtype, C: int) -> None:
    x, weight = torch.zeros(4, C, dtype=dtype), torch.zeros(C)
    stats = torch.zeros(2, 4)
    layer_norm.layer_norm_fwd(x, weight, weight, 1e-5)
    layer_norm.add_layer_norm_fwd(x, x, weight, weight, 1e-5)
    layer_norm.layer_norm_bwd(x, None, x, weight, stats)
    layer_norm.layer_norm_bwd(x, x, x, weight, stats)
    sum_dx = C <= SUM_FEATURES
    layer_norm.layer_norm_bwd(x, x, x, weight, stats, sum_dx)
    if dtype != torch.float32:  # the residual stream under autocast
        s = x.float()
        layer_norm.add_layer_norm_fwd(x, s, weight, weight, 1e-5)
        layer_norm.mixed_layer_norm_bwd(x, s, s, weight, stats)
        layer_norm.mixed_layer_norm_bwd(x, s, s, weight, stats, sum_dx)


def launch_gelu(dtype: torch.dtype, C: int) -> None:
    x, bias = torch.zeros(4, C, dtype=dtype), torch.zeros(C)
    gelu.gelu_bwd(x, gelu.gelu_fwd(x))
    gelu.bias_gelu_bwd(x, gelu.bias_gelu_fwd(x, bias), bias)


def launch_cross_entropy(dtype: torch.dtype, V: int) -> None:
    logits, targets = torch.zeros(4, V, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        losses, stats = cross_entropy.cross_entropy_fwd(logits, targets, -1, smoothing)
        cross_entropy.cross_entropy_fwd_bwd_(logits, targets, -1, smoothing, V)
        cross_entropy.cross_entropy_bwd(losses, logits, targets, stats, -1, smoothing)


LAUNCHES = {  # op: (what launches its kernels, the sizes that change them)
    "attention": (launch_attention, HEAD_SIZES),
    "decode_attention": (launch_decode_attention, (64, 80, 256)),
    "layer_norm": (launch_layer_norm, ROW_LENGTHS),
    "gelu": (launch_gelu, (3072,)),
    "cross_entropy": (launch_cross_entropy, (50257,)),
}


def measure(binary) -> dict[str, int]:
    """The costs of a compiled kernel: registers per thread, bytes of stack and of shared memory,
    and the number of tensor-core instructions in its machine code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def dump(flag):
            command = [tools / "cuobjdump", flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    found = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        **found,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": binary.metadata.shared,
        "mma": len(re.findall(r"\bH(?:G)?MMA\.", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\.", sass)),
    }


def rows(archs, ops, dtypes, sizes=None):
    """One dict per kernel, architecture, dtype and size."""
    for arch in archs:
        for op in ops:
            launch, every_size = LAUNCHES[op]
            for dtype in dtypes:
                for size in every_size:
                    if sizes and size not in sizes and "attention" in op:
                        continue
                    with CompileOnly(arch) as compiled:
                        launch(DTYPES[dtype], size)
                    for (kernel, tile), binary in compiled.items():
                        tile = ",".join(f"{k}={v}" for k, v in tile)
                        yield {
                            "kernel": kernel, "arch": arch, "dtype": dtype, "size": size,
                            "tile": tile, **measure(binary),
                        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-size", type=int, nargs="+", choices=HEAD_SIZES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("compile_kernels.py compiles: unset TRITON_INTERPRET")
    found = []
    columns = (
        "kernel",
        "arch",
        "dtype",
        "size",
        "reg",
        "stack",
        "spills",
        "shared",
        "mma",
        "wgmma",
    )
    widths = (28, 5, 6, 6, 4, 6, 7, 7, 4, 6)
    print("".join(f"{c:<{w}}" for c, w in zip(columns, widths, strict=True)), "tile")
    for row in rows(args.arch, args.op, args.dtype, args.head_size):
        found.append(row)
        cells = (f"{row[c]:<{w}}" for c, w in zip(columns, widths, strict=True))
        print("".join(cells), row["tile"], flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
