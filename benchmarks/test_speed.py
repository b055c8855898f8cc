"""A few benchmarks for pytest-benchmark, to find regressions between two commits.

pytest --benchmark-only benchmarks/ --benchmark-autosave
pytest --benchmark-only benchmarks/ --benchmark-compare --benchmark-compare-fail=median:10%
"""

import os

import attention
import cross_entropy
import gelu
import layer_norm
import pytest
import torch
from bench import harness, options

from gpt2 import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = {
    attention: {"cpu": "1x256x12x64", "cuda": "16x1024x12x64"},
    layer_norm: {"cpu": "512x768", "cuda": "16384x768"},
    gelu: {"cpu": "256x3072", "cuda": "16384x3072"},
    cross_entropy: {"cpu": "32x50257x768", "cuda": "8192x50257x768"},
}
CASES = [
    pytest.param(script, op, step, backend, id=f"{op.name}-{step}-{backend}")
    for script in SHAPES
    for op in script.OPS
    for step in op.passes
    for backend in kernels.BACKENDS
]


@pytest.mark.parametrize(("script", "op", "step", "backend"), CASES)
def test_speed(benchmark, script, op, step, backend):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: an interpreted kernel has no speed to measure")
    shape = options.parse_shape(SHAPES[script][DEVICE.type], script.DIMS)
    reason = kernels.why_not(backend, op.kernel, DEVICE, DTYPE, op.size(shape))
    if reason:
        pytest.skip(reason)
    inputs, grads = harness.draw(op, shape, DEVICE, DTYPE)
    with kernels.use(backend):
        run = harness.stepper(step, op.call, inputs, grads)
        benchmark.extra_info["shape"] = vars(shape)
        benchmark(finished, run)


def finished(run):
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
