"""Guarantees of the CUDA kernels alone. test_<op>.py test their ops together with the other
backends."""

import numpy as np
import pytest
import torch
from backends import CUDA, serving
from inputs import norm_inputs, qkv_in
from util import DEVICE, DTYPES, bits_equal, check_op

from gpt2 import kernels


@pytest.fixture(params=[CUDA])
def kernel_backend(request, monkeypatch):
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


# Kernels differ in the columns per thread and in 16-byte accesses; their unrolled loops need a
# block with several rows. (For attention and cross_entropy see test_every_kernel there.)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (767, 768, 1023, 1024, 2047, 2048, 8191, 8192, 8193, 8200))
def test_every_layer_norm_kernel(C, dtype, ran, kernel_backend):
    inputs = norm_inputs((2200 if C < 1000 else 300, C), DTYPES[dtype])
    check_op("layer_norm", inputs, backend=kernel_backend, ran=ran)
    inputs = {"x": inputs["x"], "residual": torch.randn_like(inputs["x"]), **inputs}
    check_op("add_layer_norm", inputs, backend=kernel_backend, ran=ran)
    if dtype != "fp32":  # the residual stream under autocast
        inputs["residual"] = inputs["residual"].float()
        check_op("add_layer_norm", inputs, backend=kernel_backend, ran=ran)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", (17, 24))
def test_every_bias_gelu_kernel(C, dtype, ran, kernel_backend):
    x, bias = (torch.randn(*shape, device=DEVICE).to(DTYPES[dtype]) for shape in ((1400, C), (C,)))
    check_op("bias_gelu", {"x": x, "bias": bias}, backend=kernel_backend, ran=ran)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 4])
def test_misaligned_views_are_copied(offset, dtype, kernel_backend):
    """Rows that do not start at multiples of 16 bytes, from the first or from the second row on."""
    B, T, H, D = 2, 17, 2, 32
    aligned = qkv_in("contiguous", B, T, T, H, D, DTYPES[dtype])
    shifted, spread = [], []
    for x in aligned:
        buffer = torch.full((x.numel() + offset,), torch.nan, dtype=x.dtype, device=DEVICE)
        shifted.append(buffer[offset:].view_as(x).copy_(x))
        rows = torch.full((B, T, H, D + offset), torch.nan, dtype=x.dtype, device=DEVICE)
        spread.append(rows[..., :D].copy_(x))
    with kernels.use(kernel_backend):
        results = [kernels.causal_attention(*views) for views in (aligned, shifted, spread)]
    assert bits_equal(results[0], results[1]) and bits_equal(results[0], results[2])


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would not recover from it")
def test_a_failed_launch_is_an_error(kernel_backend):
    """The error names the kernel and the emulator's finding: here memory that the device did not
    allocate."""
    q, cache = torch.randn(1, 1, 1, 32), torch.from_numpy(np.zeros((1, 5, 1, 32), np.float32))
    lengths = torch.tensor([5])
    with pytest.raises(
        RuntimeError, match=r"^decode_attention: .*\[bounds\] .*decode_attention_kernel"
    ):
        torch.ops.gpt2_kernels_cuda.decode_attention(q, cache, cache, lengths, 1.0)


@pytest.mark.full
@pytest.mark.cuda_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU refuses what it does not have")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (32, 64, 96, 128))
def test_attention_fits_the_shared_memory_of_every_gpu(D, dtype, monkeypatch):
    """A block has 99 KiB with compute capability 8.6; 8.0 and 9.0 have more."""
    with serving("cuda", monkeypatch) as device, kernels.use("cuda"):
        qkv = torch.randn(1, 1, 3 * D).to(DTYPES[dtype]).requires_grad_()
        kernels.causal_attention_qkv(qkv, 1).sum().backward()
    assert len(device.launches) == 3
    assert all(0 < launch.shared_bytes <= 99 << 10 for launch in device.launches)
