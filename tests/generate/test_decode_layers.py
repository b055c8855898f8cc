"""DecodeLayers names the argument that does not fit. Each case once read or wrote out of bounds, or
crashed."""

import pytest
import torch

from gpt2 import kernels
from gpt2.generate.decode_layers import DecodeLayers, Layer, Linear, Norm

pytestmark = pytest.mark.cpu_kernels
B, T, H, D = 2, 5, 2, 8
C = H * D


def layer(packed=False, **replaced):
    def linear(N, K):
        weight = torch.randn(N, K)
        if not packed:
            return Linear(weight, torch.randn(N))
        numbers, scale = kernels.quantize_int8(weight)
        return Linear(numbers, torch.randn(N), scale)

    norm = Norm(torch.ones(C), torch.zeros(C))
    parts = Layer(norm, linear(3 * C, C), linear(C, C), norm, linear(4 * C, C), linear(C, 4 * C))
    for name, changes in replaced.items():
        parts = parts._replace(**{name: getattr(parts, name)._replace(**changes)})
    return parts


def test_kernels_still_have_the_name():
    assert kernels.DecodeLayers is DecodeLayers
    assert not hasattr(kernels, "Decode")


def call(layers=None, norm=None, n_head=H, eps=1e-5, **replaced):
    layers = [layer(), layer()] if layers is None else layers
    arguments = {
        "x": torch.randn(B, C),
        "kv": torch.zeros(2, B, T, 2, H, D),
        "lengths": torch.tensor([0, T - 1]),
    } | replaced
    decode = DecodeLayers(layers, norm or Norm(torch.ones(C), torch.zeros(C)),
                          n_head=n_head, eps=eps)  # fmt: skip
    return decode(*arguments.values())


WIDE, META = torch.ones(2 * C), torch.ones(C, device="meta")
CASES = {
    "layers must not be empty": {"layers": []},
    "n_head must be an int that divides C = 16, got 3": {"n_head": 3},
    "n_head must be an int that divides C = 16, got 0": {"n_head": 0},
    "n_head must be an int that divides C = 16, got 2.0": {"n_head": 2.0},
    "eps must not be negative, got -1": {"eps": -1},
    "norm.weight must have shape (16,)": {"norm": Norm(torch.ones(1), torch.zeros(C))},
    "norm.bias must have shape (16,)": {"norm": Norm(torch.ones(C), WIDE)},
    "norm.weight must have shape (16,) and be torch.float32 on cpu, got (16,), torch.float32 on "
    "meta": {"norm": Norm(META, META)},
    "layers[1].norm_1.weight": {"layers": [layer(), layer(norm_1={"weight": torch.ones(1)})]},
    "layers[1].norm_2.bias": {"layers": [layer(), layer(norm_2={"bias": META})]},
    "layers[0].qkv.weight must have shape (48, 16)": {
        "layers": [layer(qkv={"weight": torch.ones(C, C)}), layer()]
    },
    "layers[1].proj.weight must have shape (16, 16) and be torch.float32": {
        "layers": [layer(), layer(proj={"weight": torch.ones(C, C).bfloat16()})]
    },
    "layers[1].fc.bias must have shape (64,)": {
        "layers": [layer(), layer(fc={"bias": torch.ones(1)})]
    },
    "layers[1].mlp_proj.bias must have shape (16,) and be torch.float32 on cpu": {
        "layers": [layer(), layer(mlp_proj={"bias": META})]
    },
    "layers[1].qkv.scale must have shape (48,)": {
        "layers": [layer(packed=True), layer(packed=True, qkv={"scale": torch.ones(1)})]
    },
    "layers[0].proj.scale must have shape (16,) and be torch.float32": {
        "layers": [layer(packed=True, proj={"scale": torch.ones(C).double()}), layer(packed=True)]
    },
    "layers must be int8 as a whole or not at all": {"layers": [layer(packed=True), layer()]},
    "x must be a tensor of 2 dimensions": {"x": torch.randn(C)},
    "x must have shape (2, 16)": {"x": torch.randn(B, C + 1)},
    "x must have shape (2, 16) and be torch.float32 on cpu": {"x": torch.randn(B, C).double()},
    "kv must be a tensor of 6 dimensions": {"kv": torch.zeros(2, B, T, 2, C)},
    "kv must have shape (2, 2, 5, 2, 2, 8)": {"kv": torch.zeros(1, B, T, 2, H, D)},
    "kv must be contiguous": {"kv": torch.zeros(2, B, T, 2, D, H).transpose(4, 5)},
    "lengths must have shape (2,)": {"lengths": torch.tensor([0])},
    "lengths must have shape (2,) and be torch.int64": {"lengths": torch.tensor([0.0, 1.0])},
    "lengths must lie in [0, 5), got 5": {"lengths": torch.tensor([0, T])},
    "lengths must lie in [0, 5), got -1": {"lengths": torch.tensor([-1, 0])},
}


def test_a_valid_call():
    """The cases below differ from this call by one change."""
    with torch.no_grad():
        assert call().shape == call(layers=[layer(packed=True)] * 2).shape == (B, C)


@pytest.mark.parametrize("message", CASES)
def test_what_does_not_fit_is_named(message):
    with torch.no_grad(), pytest.raises(ValueError) as error:
        call(**CASES[message])
    assert str(error.value).startswith(message)


def test_something_else_than_a_tensor():
    with pytest.raises(TypeError, match=r"layers\[1\].fc.weight must be a tensor, got list"):
        call(layers=[layer(), layer(fc={"weight": [1.0]})])
