"""The weights of a GPT-2 as every file format is read into, and written from.

A state holds every weight once, under its own name (`transformer.h.0.ln_1.weight`), linear ones as
(out, in). The head is the token embedding, so it has no entry. dtypes are those of the file: what
goes from one format into another is not rounded on the way.

A file is judged by what it says of its tensors, before memory is taken for any of them.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .config import Config
from .errors import InputError, brief
from .model import Model

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # by safetensors' names
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module)\."
)  # torch.compile's and DDP's, at any depth
TENSORS_PER_LAYER, TENSORS_OUTSIDE = 12, 4
_LEAST_PER_LAYER = 6  # without biases
_FEW_LAYERS = 100
MAX_SMALL_LAYERS = 1000  # of any width; more are read where each has as many bytes as these:
_BYTES_PER_LAYER = 2**15  # of float32, a width of 27


def plain(name: str) -> str:
    """The name of a weight without what torch.compile and DDP put before it."""
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
    """Raises InputError where a file of so many tensors and of `size` bytes cannot hold n_layer
    layers. Called before anything is made for each layer.

    A few layers too many pass: the list of what is missing tells more.
    """
    if n_layer > max(tensors // _LEAST_PER_LAYER, _FEW_LAYERS):
        raise InputError(f"{what} must hold the weights of {n_layer} layers, got {tensors} tensors")
    check_depth(what, n_layer, size)


def check_depth(what: str, n_layer: int, size: int) -> None:
    """Raises InputError where a file of `size` bytes is small for n_layer layers: as Python's
    objects, they take more memory than their weights."""
    most = max(MAX_SMALL_LAYERS, size // _BYTES_PER_LAYER)
    if n_layer > most:
        raise InputError(f"{what} must have at most {most} layers in {size} bytes, got {n_layer}")


def check_names(
    what: str, config: Config, names: Iterable[str], size: int, biases: bool = True
) -> Shapes:
    """The shapes of the weights that a file of `size` bytes must hold. Raises InputError, beginning
    with `what`, unless names are exactly theirs (without biases: those that do not end in
    `.bias`)."""
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
    """Raises InputError unless a tensor is stored in this shape, and as floats (safetensors' name
    of the dtype)."""
    if dtype not in DTYPES or stored != shape:
        raise InputError(
            f"{what} must hold {brief(name)} as {', '.join(DTYPES)} of shape {shape}, "
            f"got {dtype} of shape {brief(stored)}"
        )


def check_tied(what: str, wte: Tensor, head: Tensor) -> None:
    """Raises InputError unless a head that is stored, too, is the token embedding, bit for bit."""
    same = wte.dtype == head.dtype and wte.shape == head.shape
    if not same or not torch.equal(wte.view(torch.uint8), head.view(torch.uint8)):
        raise InputError(
            f"{what} must hold a head that is tied: lm_head.weight equal to wte.weight, got another"
        )


def of_model(model: Model) -> State:
    """The weights of model, on the CPU; they share its memory where they lie there. Raises
    InputError where they are int8: no file format here holds those."""
    state = {name: p.detach().cpu() for name, p in model.named_parameters()}
    expected = shapes(model.config)
    if missing := [name for name in expected if name not in state]:
        raise InputError(
            f"model must have floating weights to be saved (save it before it is quantized: int8 "
            f"weights are for inference alone), got none for {some(missing)}"
        )
    return {name: state[name] for name in expected}


def to_model(
    config: Config, state: State, *, fast: bool = False, dtype: torch.dtype | None = None
) -> Model:
    """A model in eval mode with these weights, in memory of its own; in PyTorch's default dtype
    unless another is given."""
    with torch.device("meta"):  # shapes without memory
        model = Model(config, fast=fast)
    dtype = dtype or torch.get_default_dtype()
    own = {n: state[n].to(dtype, copy=True).contiguous() for n in shapes(config)}
    model.load_state_dict({**own, HEAD: own[WTE]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def crop(
    config: Config, state: State, *, block_size: int | None = None, vocab_size: int | None = None
) -> tuple[Config, State]:
    """The first block_size positions and vocab_size tokens alone.

    Raises InputError where the model has fewer.
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
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(map(brief, names[:3])) or "none") + more
