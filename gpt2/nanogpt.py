"""nanoGPT's ckpt.pt: a dictionary with `model`, its state dict, and `model_args`, its sizes.

build-nanogpt's checkpoints have `config` instead, an object of the class GPTConfig.

Both are pickles, read by PyTorch's unpickler for weights, which calls nothing that a file names
beyond what makes tensors, and only once the file is seen to ask for nothing but that. GPTConfig is
not looked up: an empty class stands for it, and takes its values. A model without biases is one
with biases of zero. nanoGPT computes GELU by erf, this model by tanh, as GPT-2 and build-nanogpt
do: weights are kept to the bit, the logits differ a little.
"""

import io
import re
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import files, pickles, weights
from .config import Config
from .errors import InputError, brief, quoted
from .weights import DTYPES, HEAD, WTE, State

_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MASK = re.compile(r"\.attn\.(masked_)?bias$")  # buffers, where attention is not fused
_GLOBALS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_tensor_v2"
    r"|torch (Float|Half|BFloat16|Double|Long|Int|Short|Char|Byte|Bool)Storage"
)  # what the pickle of tensors, numbers and texts names
_CONFIGS = re.compile(r"([\w.]{1,200}) GPTConfig")  # and the class of build-nanogpt's config
_MAX_PICKLE_BYTES = 2**22  # that of gpt2-xl with its optimizer has about 300,000


def is_one(path: Path) -> bool:
    """Whether a file is an archive, as torch.save writes it."""
    with files.open_regular(path) as file:
        return file.read(4) == b"PK\3\4"


class _GPTConfig:
    """What an object of the class GPTConfig in a file becomes: its values, and nothing else."""


def say(model) -> None:
    """A warning, once per process, where a model (convert.Source) was trained with GELU by erf."""
    if model.gelu == "erf":
        _say(f"{quoted(model.name)} was trained with GELU by erf, as nanoGPT computes it; here it "
             f"is tanh, as in GPT-2: logits differ a little")  # fmt: skip


def say_written() -> None:
    """The same of a model that is written for nanoGPT."""
    _say("nanoGPT computes GELU by erf, this model by tanh, as GPT-2: logits differ a little")


def _say(text: str) -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(text, stacklevel=4)


_said = False


def read(path: Path) -> tuple[Config, State, str]:
    """The configuration, the weights, memory-mapped, and the GELU, erf or tanh.

    Raises InputError, naming the file, where it is broken, asks for more than tensors, or does not
    hold exactly the weights of its configuration.
    """
    what = f"nanoGPT's {quoted(path)}"
    checkpoint = _load(what, path)
    args, gelu = _sizes(checkpoint)
    if args is None or not isinstance(checkpoint.get("model"), dict):
        raise InputError(
            f"{what} must hold model, and model_args or config, got {brief(_keys(checkpoint))}"
        )
    config, biases = _config(what, args)
    found = {}
    for key, tensor in checkpoint["model"].items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{what} must hold tensors by name, got {brief(repr(key))}")
        name = weights.plain(key)
        if _MASK.search(name):
            continue
        if name in found:
            raise InputError(f"{what} must hold {brief(name)} once, got it with and without prefix")
        found[name] = tensor
    size = path.stat().st_size
    expected = weights.check_names(what, config, found.keys() - {HEAD}, size, biases)
    for name, tensor in found.items():
        shape = expected[WTE if name == HEAD else name]
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
        weights.check_tensor(what, name, shape, tuple(tensor.shape), dtype)
    _check_plain(what, found)
    if HEAD in found:
        weights.check_tied(what, found[WTE], found[HEAD])
    dtype = found[WTE].dtype
    state = {
        name: found[name] if name in found else torch.zeros(shape, dtype=dtype)
        for name, shape in weights.shapes(config).items()
    }
    return config, state, gelu


def write(config: Config, state: State, path: Path) -> None:
    """Writes path whole: nanoGPT's sample.py and train.py load it with init_from = 'resume'.

    Training there begins anew, at iteration 0 with an AdamW that has not stepped.
    """
    # copies: of a view, torch.save would write all of the memory that it is a part of
    tensors = [state[name].clone().contiguous() for name in weights.shapes(config)]
    model = dict(zip(weights.shapes(config), tensors, strict=True))
    groups = [
        {"params": [t for t in tensors if t.dim() >= 2], "weight_decay": 0.1},
        {"params": [t for t in tensors if t.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))  # nanoGPT's defaults
    checkpoint = {
        "model": {**model, HEAD: model[WTE]},
        "optimizer": optimizer.state_dict(),
        "model_args": {
            **{size: getattr(config, size) for size in _SIZES},
            "dropout": config.dropout,
            "bias": True,
        },
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {},
    }

    def write_file(temporary: Path) -> None:
        with temporary.open(
            "wb"
        ) as file:  # torch.save opens no file: its own errors have no number
            torch.save(checkpoint, file)

    files.write_atomic(path, write_file)


def _sizes(checkpoint: Any) -> tuple[dict[Any, Any] | None, str]:
    """The sizes, and the GELU: nanoGPT's models, which alone may leave out biases, have erf."""
    if not isinstance(checkpoint, dict):
        return None, ""
    if isinstance(checkpoint.get("model_args"), dict):
        return checkpoint["model_args"], "erf"
    if isinstance(checkpoint.get("config"), _GPTConfig):
        args = vars(checkpoint["config"])
        return args, "erf" if "bias" in args else "tanh"
    return None, ""


def _config(what: str, args: dict[Any, Any]) -> tuple[Config, bool]:
    """The configuration, and whether the file has biases."""
    if unknown := [key for key in args if key not in (*_SIZES, "dropout", "bias")]:
        raise InputError(f"{what} must not have model_args of a fork, got {brief(unknown)}")
    if missing := [key for key in _SIZES if key not in args]:
        raise InputError(f"{what} must have {missing[0]} among its model_args, got none")
    biases = args.get("bias", True)
    if not isinstance(biases, bool):
        raise InputError(f"{what}: bias must be True or False, got {brief(repr(biases))}")
    try:
        sizes = {size: args[size] for size in _SIZES}
        return Config(**sizes, dropout=args.get("dropout", 0.0)), biases
    except (TypeError, ValueError) as e:
        raise InputError(f"{what}: {brief(e)}") from e


def _check_plain(what: str, found: State) -> None:
    """Raises InputError unless each tensor is stored as its numbers, in memory that no other has;
    the head may have that of the embedding."""
    for name, tensor in found.items():
        if tensor.is_neg() or tensor.is_conj():
            raise InputError(
                f"{what} must hold {brief(name)} as its numbers, got their negative or conjugate"
            )
    spans = sorted((t.data_ptr(), t.nbytes) for name, t in found.items() if name != HEAD)
    shared = any(start + size > after for (start, size), (after, _) in pairwise(spans))
    if shared or not all(tensor.is_contiguous() for tensor in found.values()):
        raise InputError(f"{what} must hold every weight whole, got views of each other")


def _load(what: str, path: Path) -> Any:
    try:
        stands_for = [(_GPTConfig, f"{module}.GPTConfig") for module in _check_archive(path)]
        with torch.serialization.safe_globals(stands_for):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # what PyTorch and zipfile raise for broken files is of every kind
        raise InputError(f"{what} cannot be read: {brief(e) or type(e).__name__}") from e


class _InParts(io.BufferedReader):
    """A file of which only so much is read at a time: zipfile reads a table of contents at once,
    and takes ten times its size in memory."""

    def __init__(self, file: BinaryIO):
        super().__init__(file.raw)
        self._most = max(_MAX_PICKLE_BYTES, files.size_of(self) // 16)

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self._most:
            raise ValueError(f"at most {self._most} bytes of a table are read, got {size}")
        return super().read(size)


def _check_archive(path: Path) -> set[str]:
    """The modules that a pickle takes GPTConfig from.

    Raises ValueError for an archive that is larger than its file, or a pickle that names anything
    else that tensors are not made of.
    """
    with (
        files.open_regular(path) as opened,
        _InParts(opened) as file,
        zipfile.ZipFile(file) as archive,
    ):
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("an archive of torch.save is expected, got a compressed one")
        sizes = [max(entry.file_size, entry.compress_size) for entry in entries]
        if sum(sizes) > files.size_of(file):
            raise ValueError("its parts are larger than the file")
        found = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(found) != 1:  # PyTorch ignores case
            raise ValueError(f"one data.pkl is expected, got {len(found)}")
        if found[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {found[0].file_size} bytes")
        data = archive.read(found[0])
    if torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != data:
        raise ValueError("its table of contents is ambiguous")
    return _check_pickle(data, len(entries))


def _check_pickle(data: bytes, entries: int) -> set[str]:
    """The modules that data takes GPTConfig from. A tensor takes three objects, one of which is an
    entry of the archive."""
    modules: set[str] = set()

    def name(found: str) -> None:
        if match := _CONFIGS.fullmatch(found):
            modules.add(match[1])
        elif not _GLOBALS.fullmatch(found):
            raise ValueError(f"its pickle asks for {brief(found)}")

    pickles.check(data, name, max_objects=4 * entries + 64)
    return modules


def _keys(checkpoint: Any) -> Any:
    return list(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
