"""No kernel may have more than 16 parameters: strides are passed together with their tensors."""

import importlib
import re

import pytest
from processes import ROOT

MOST = 16
CUDA = ROOT / "csrc/cuda"
TRITON = ("attention", "cross_entropy", "decode_attention", "gelu", "layer_norm")


@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu*")), ids=lambda path: path.name)
def test_of_cuda(source):
    text = re.sub(r"//.*", "", source.read_text())
    for name, parameters in re.findall(r"__global__\b[^;{]*?(\w+_kernel)\(([^{]*)\) \{", text):
        assert len(parameters.split(",")) <= MOST, name


@pytest.mark.triton
@pytest.mark.parametrize("op", TRITON)
def test_of_triton(op):
    module = importlib.import_module(f"gpt2.kernels.triton.{op}")
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    assert kernels
    for name, kernel in kernels.items():
        assert len(kernel.arg_names) <= MOST, name
