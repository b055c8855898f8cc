"""The state of a GPT-2: the common form that every file format is read into and written from.

A state holds every weight once, by name (`transformer.h.0.ln_1.weight`), linear ones as (out, in).
The head is tied to the token embedding, so it has no entry. Weights keep the dtype of their file,
so a conversion does not round them.

The names, shapes and dtypes in a file are validated before any memory is allocated for tensors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from ..errors import InputError, brief

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # by safetensors' names
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")  # from torch.compile and DDP
_LEAST_PER_LAYER = 6  # without biases
_FEW_LAYERS = 100
MAX_SMALL_LAYERS = 1000  # of any width; beyond that, each must have _BYTES_PER_LAYER
_BYTES_PER_LAYER = 2**15  # a layer of width 27 in float32


def plain(name: str) -> str:
    """The name of a weight without the prefixes that torch.compile and DDP add."""
    return _WRAPPERS.sub("", name)


def shapes(config: Config) -> Shapes:
    """The name and the shape of every weight, in the order of the model's parameters."""
    C = config.n_embd
    found = {WTE: (config.vocab_size, C), WPE: (config.block_size, C)}
    for i in range(config.n_layer):
        for name, shape in (
            ("ln_1.weight", (C,)),
            ("ln_1.bias", (C,)),
            ("attn.c_attn.weight", (3 * C, C)),
            ("attn.c_attn.bias", (3 * C,)),
            ("attn.c_proj.weight", (C, C)),
            ("attn.c_proj.bias", (C,)),
            ("ln_2.weight", (C,)),
            ("ln_2.bias", (C,)),
            ("mlp.c_fc.weight", (4 * C, C)),
            ("mlp.c_fc.bias", (4 * C,)),
            ("mlp.c_proj.weight", (C, 4 * C)),
            ("mlp.c_proj.bias", (C,)),
        ):
            found[f"transformer.h.{i}.{name}"] = shape
    return {**found, "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def check_layers(what: str, n_layer: int, *, tensors: int, size: int) -> None:
    """Raises InputError if a file of `tensors` tensors and `size` bytes cannot hold n_layer
    layers. Call it before allocating anything per layer.

    A few layers too many are let through: check_names lists what is missing, which tells more.
    """
    if n_layer > max(tensors // _LEAST_PER_LAYER, _FEW_LAYERS):
        raise InputError(f"{what} must hold the weights of {n_layer} layers, got {tensors} tensors")
    check_depth(what, n_layer, size)


def check_depth(what: str, n_layer: int, size: int) -> None:
    """Raises InputError if a file of `size` bytes is too small for n_layer layers. The Python
    objects of tiny layers take more memory than their weights."""
    most = max(MAX_SMALL_LAYERS, size // _BYTES_PER_LAYER)
    if n_layer > most:
        raise InputError(f"{what} must have at most {most} layers in {size} bytes, got {n_layer}")


def check_names(
    what: str, config: Config, names: Iterable[str], size: int, biases: bool = True
) -> Shapes:
    """The shapes of the weights that a file of `size` bytes must hold.

    biases=False excludes the names that end in `.bias`. Raises InputError, beginning with `what`,
    unless names are exactly those of the weights.
    """
    found = set(names)
    check_layers(what, config.n_layer, tensors=len(found), size=size)
    expected = shapes(config)
    if not biases:
        expected = {name: s for name, s in expected.items() if not name.endswith(".bias")}
    missing = [name for name in expected if name not in found]
    unexpected = sorted(found - expected.keys())
    if missing or unexpected:
        raise InputError(
            f"{what} must hold exactly the model's weights; "
            f"missing: {some(missing)}; unexpected: {some(unexpected)}"
        )
    return expected


def check_tensor(what: str, name: str, shape: tuple[int, ...], stored: tuple, dtype: str) -> None:
    """Raises InputError unless a tensor is stored with this shape and a dtype of DTYPES. dtype is
    safetensors' name for it."""
    if dtype not in DTYPES or stored != shape:
        raise InputError(
            f"{what} must hold {brief(name)} as {', '.join(DTYPES)} of shape {shape}, "
            f"got {dtype} of shape {brief(stored)}"
        )


def check_tied(what: str, wte: Tensor, head: Tensor) -> None:
    """Raises InputError unless a stored head equals the token embedding bit for bit."""
    same = wte.dtype == head.dtype and wte.shape == head.shape
    if not same or not torch.equal(wte.view(torch.uint8), head.view(torch.uint8)):
        raise InputError(
            f"{what} must hold a head that is tied: lm_head.weight equal to wte.weight, got another"
        )


def complete(config: Config, parameters: Mapping[str, Tensor]) -> State:
    """The state of a model, from its parameters, on the CPU.

    Raises InputError if a weight is missing. An int8 model lacks its linear weights, and no file
    format can hold such a model.
    """
    expected = shapes(config)
    if missing := [name for name in expected if name not in parameters]:
        raise InputError(
            f"model must have floating weights to be saved (save it before it is quantized: int8 "
            f"weights are only for inference), got none for {some(missing)}"
        )
    return {name: parameters[name].detach().cpu() for name in expected}


def crop(
    config: Config, state: State, *, block_size: int | None = None, vocab_size: int | None = None
) -> tuple[Config, State]:
    """The model cut to its first block_size positions and vocab_size tokens.

    Raises InputError if the model has fewer.
    """
    for field, name, size in (("block_size", WPE, block_size), ("vocab_size", WTE, vocab_size)):
        if size is not None:
            if not 1 <= size <= getattr(config, field):
                raise InputError(
                    f"{field} must be 1 to {getattr(config, field)}, the model's own, got {size}"
                )
            config = replace(config, **{field: size})
            state = {**state, name: state[name][:size]}
    return config, state


def some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(map(brief, names[:3])) or "none") + more
