"""nanoGPT's ckpt.pt: a dictionary with `model`, a state dict, and `model_args`, the sizes.

build-nanogpt's checkpoints have `config` instead of `model_args`, an object of class GPTConfig.

Both are pickles. A file is first checked to name nothing except what tensors need; then PyTorch's
weights_only unpickler loads it, which calls nothing else. GPTConfig is never imported: an empty
class takes its place and receives its values. A model without biases is read with biases of zero.
nanoGPT computes GELU by erf; this model computes it by tanh, as GPT-2 and build-nanogpt do. So the
weights keep their bits, but the logits differ a little.
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

from .. import files
from ..config import Config
from ..errors import InputError, brief, quoted
from ..files import pickles
from . import weights
from .weights import DTYPES, HEAD, WTE, State

_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MASK = re.compile(r"\.attn\.(masked_)?bias$")  # buffers of attention that is not fused
_GLOBALS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_tensor_v2"
    r"|torch (Float|Half|BFloat16|Double|Long|Int|Short|Char|Byte|Bool)Storage"
)  # the names in a pickle of tensors, numbers and strings
_CONFIGS = re.compile(r"([\w.]{1,200}) GPTConfig")  # the class of build-nanogpt's config
_MAX_PICKLE_BYTES = 2**22  # gpt2-xl's pickle with its optimizer has about 300,000


def is_one(path: Path) -> bool:
    """Whether a file is a zip archive, the format that torch.save writes."""
    with files.open_regular(path) as file:
        return file.read(4) == b"PK\3\4"


class _GPTConfig:
    """Stands in for a file's GPTConfig class: it holds the object's values and runs no code."""


def say(model) -> None:
    """Warns once per process if a model (convert.Source) was trained with GELU by erf."""
    if model.gelu == "erf":
        _say(f"{quoted(model.name)} was trained with GELU by erf, as nanoGPT computes it; here it "
             f"is tanh, as in GPT-2: logits differ a little")  # fmt: skip


def say_written() -> None:
    """Warns once per process that nanoGPT will compute a written model's GELU by erf."""
    _say("nanoGPT computes GELU by erf, this model by tanh, as GPT-2: logits differ a little")


def _say(text: str) -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(text, stacklevel=4)


_said = False


def read(path: Path) -> tuple[Config, State, str]:
    """The configuration, the memory-mapped weights, and the kind of GELU: erf or tanh.

    Raises InputError, naming the file, if it is broken, names anything except tensors, or does
    not hold exactly the weights of its configuration.
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
    """Writes path atomically. nanoGPT's sample.py and train.py load it with init_from = 'resume'.

    nanoGPT then starts training at iteration 0 with fresh AdamW state.
    """
    # copies, because torch.save writes the whole storage behind a view
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
        # opened here, because errors of torch.save's own file have no errno
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)

    files.write_atomic(path, write_file)


def _sizes(checkpoint: Any) -> tuple[dict[Any, Any] | None, str]:
    """The sizes and the kind of GELU. nanoGPT's models use erf; only they have the option bias."""
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
    """Raises InputError if a tensor is a negative or conjugate view, is not contiguous, or shares
    memory with another. Only the head may share the embedding's memory."""
    for name, tensor in found.items():
        if tensor.is_neg() or tensor.is_conj():
            raise InputError(
                f"{what} must hold {brief(name)} as plain values, got a negative or conjugate view"
            )
    spans = sorted((t.data_ptr(), t.nbytes) for name, t in found.items() if name != HEAD)
    shared = any(start + size > after for (start, size), (after, _) in pairwise(spans))
    if shared or not all(tensor.is_contiguous() for tensor in found.values()):
        raise InputError(f"{what} must store every weight separately, got views")


def _load(what: str, path: Path) -> Any:
    try:
        stands_for = [(_GPTConfig, f"{module}.GPTConfig") for module in _check_archive(path)]
        with torch.serialization.safe_globals(stands_for):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # PyTorch and zipfile raise many kinds of errors for broken files
        raise InputError(f"{what} cannot be read: {brief(e) or type(e).__name__}") from e


class _InParts(io.BufferedReader):
    """A file that refuses large single reads. zipfile reads a table of contents in one read and
    takes ten times its size in memory."""

    def __init__(self, file: BinaryIO):
        super().__init__(file.raw)
        self._most = max(_MAX_PICKLE_BYTES, files.size_of(self) // 16)

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self._most:
            raise ValueError(f"at most {self._most} bytes of a table are read, got {size}")
        return super().read(size)


def _check_archive(path: Path) -> set[str]:
    """The modules that the archive's pickle names GPTConfig in.

    Raises ValueError if the archive claims to be larger than its file, or if its pickle names
    anything else that tensors do not need.
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
    """The modules that the pickle names GPTConfig in. The number of objects is limited: a tensor
    takes three, and has one entry in the archive."""
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
