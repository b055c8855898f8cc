"""Hugging Face's GPT-2: a folder with config.json and model.safetensors, or the name of one.

Two things differ from our own names and layouts. Published files may omit the prefix
`transformer.`, and the four linear weights of a block are stored (in, out). A setting that this
model cannot compute is refused by name, not ignored. Only safetensors are read, never pickles.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..config import Config
from ..data import hf_tokenizer
from ..data.tokenizer import Tokenizer
from ..errors import InputError, brief, quoted
from . import weights
from .weights import HEAD, WTE, State

CONFIG, FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"
FILES = (CONFIG, "model*.safetensors", INDEX)  # patterns of the files to download
_SHARD = "model-{:05d}-of-{:05d}.safetensors"

_DEFAULTS = {  # transformers' sizes, used if config.json omits one
    "n_positions": 1024,
    "vocab_size": 50257,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
}
_OTHER_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
_FIXED = {  # the supported values; the first is transformers' default
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
}
_PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

_MASK = re.compile(r"(?:^|\.)h\.\d+\.attn\.(?:masked_)?bias$")  # buffers of older versions
_TRANSPOSED = re.compile(r"\.(?:c_attn|c_proj|c_fc)\.weight$")
_MAX_JSON_BYTES = 2**20  # config.json has 1,000 bytes, the index of gpt2-xl 40,000


def read_config(folder: Path, *, dropout: float | None = None) -> Config:
    """The configuration in folder's config.json.

    With dropout=None, transformers' three dropout rates must be equal. Raises InputError, naming
    the key, its value and the supported values, for a setting that this model cannot compute.
    """
    found = _read_json(folder / CONFIG)
    for key, supported in _FIXED.items():
        value = found.get(key, supported[0])
        if not any(type(value) is type(s) and value == s for s in supported):
            expected = " or ".join(map(repr, supported))
            raise InputError(
                f"{quoted(folder / CONFIG)}: {key} must be {expected}, got {brief(repr(value))}"
            )
    sizes = {key: _size(folder, found, key) for key in _DEFAULTS}
    if dropout is None:
        dropout, *others = [found.get(key, 0.1) for key in _PDROPS]
        if any(other != dropout for other in others):
            raise InputError(
                f"{quoted(folder / CONFIG)}: resid_pdrop, embd_pdrop and attn_pdrop must be one "
                f"dropout, got {brief([dropout, *others])}"
            )
    try:
        config = Config(sizes.pop("n_positions"), **sizes, dropout=dropout)
    except (TypeError, ValueError) as e:
        raise InputError(f"{quoted(folder / CONFIG)}: {brief(e)}") from e
    if found.get("n_inner") not in (None, 4 * config.n_embd):
        raise InputError(
            f"{quoted(folder / CONFIG)}: n_inner must be null or 4 n_embd = {4 * config.n_embd}, "
            f"got {brief(repr(found['n_inner']))}"
        )
    return config


def check(folder: Path, config: Config) -> None:
    """Raises InputError for the same faults as read_state, but reads no tensor. A model of this
    config is then no larger than the files."""
    with ExitStack() as stack:
        _checked(folder, config, stack)


def read_state(folder: Path, config: Config) -> State:
    """The weights in folder, in their stored dtype, linear ones transposed to (out, in).

    Raises InputError, naming file and tensor, if a tensor is missing, unexpected, of another
    shape or not floating point. This is checked before any tensor is read.
    """
    with ExitStack() as stack:
        stored, keys = _checked(folder, config, stack)
        state = {name: stored[key].get_tensor(key) for name, key in keys.items()}
    if HEAD in state:
        weights.check_tied(quoted(folder), state[WTE], state.pop(HEAD))
    return {name: turned(name, state[name]) for name in weights.shapes(config)}


def turned(name: str, tensor: Tensor) -> Tensor:
    """A weight in Hugging Face's layout from ours, or in ours from Hugging Face's."""
    return tensor.T.contiguous() if _TRANSPOSED.search(name) else tensor


def write(
    config: Config,
    state: State,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes a folder that transformers loads, with tokenizer's files if one is given.

    The end-of-text id is the tokenizer's. Without a tokenizer it is GPT-2's `<|endoftext|>`, if
    the model has that id. Every file is written atomically. A model already in the folder is
    replaced: the new one is valid once its last file is written, and then the old one's other
    files are removed. Raises InputError, with nothing written, if the tokenizer has more ids than
    the model.
    """
    limit = parse_bytes(max_shard_size)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer must have at most the model's {config.vocab_size} ids, "
            f"got {tokenizer.vocab_size}"
        )
    files.make_folder("folder", folder)
    folder = Path(folder)
    parts = _shards({name: turned(name, tensor) for name, tensor in state.items()}, limit)
    names = [FILE]
    if len(parts) > 1:
        names = [_SHARD.format(i + 1, len(parts)) for i in range(len(parts))]
        (folder / INDEX).unlink(missing_ok=True)  # the old index names other shards
    for name, part in zip(names, parts, strict=True):
        files.write_atomic(
            folder / name, lambda path, part=part: save_file(part, path, {"format": "pt"})
        )
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    eot = 50256 if config.vocab_size >= 50257 else None
    if tokenizer is not None:
        hf_tokenizer.write(tokenizer, folder, config.block_size)
        eot = tokenizer.eot
    described = _describe(config, dtypes.pop() if len(dtypes) == 1 else None, eot)
    _write_json(folder / CONFIG, described)
    if len(parts) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for path in (folder / FILE, folder / INDEX, *folder.glob("model-?????-of-?????.safetensors")):
        if path.name not in (*names, INDEX if len(parts) > 1 else None):
            path.unlink(missing_ok=True)


def _describe(config: Config, dtype: str | None, eot: int | None) -> dict[str, Any]:
    """The content of config.json."""
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(_PDROPS, config.dropout),
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
    }
    return described | ({"dtype": dtype} if dtype else {})


def _shards(state: State, limit: int) -> list[State]:
    """The weights in order, split into parts of at most limit bytes. A larger weight gets a part
    of its own."""
    parts: list[State] = [{}]
    room = limit
    for name, tensor in state.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = tensor
        room -= tensor.nbytes
    return parts


def parse_bytes(size: int | str) -> int:
    """A number of bytes, given as such or in transformers' form, such as "5GB" (powers of ten)."""
    match = re.fullmatch(r"(\d{1,20})(KB|MB|GB)", size) if isinstance(size, str) else None
    if match:
        size = int(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(
            f"max_shard_size must be a number of bytes above 0, or such as '5GB', "
            f"got {brief(repr(size))}"
        )
    return size


def _names(what: str, keys: Iterable[str]) -> dict[str, str]:
    """Our name of each weight -> its key in the file, without mask buffers."""
    found: dict[str, str] = {}
    for key in keys:
        if _MASK.search(key):
            continue
        name = weights.plain(key)
        name = name if name.startswith(("transformer.", HEAD)) else f"transformer.{name}"
        if name in found:
            raise InputError(f"{what} must hold {brief(name)} once, got it with and without prefix")
        found[name] = key
    if WTE not in found and HEAD in found:  # tied: the head is the embedding
        found[WTE] = found.pop(HEAD)
    return found


def _checked(
    folder: Path, config: Config, stack: ExitStack
) -> tuple[dict[str, safe_open], dict[str, str]]:
    """The file that holds each key, and the key for each of our names. Raises InputError unless
    these are exactly the weights of config."""
    what = quoted(folder)
    stored, size = _open(folder, stack)
    keys = _names(what, stored)
    expected = weights.check_names(what, config, keys.keys() - {HEAD}, size)
    for name, key in keys.items():
        shape = expected[WTE if name == HEAD else name]
        tensor = stored[key].get_slice(key)
        weights.check_tensor(
            what,
            key,
            shape[::-1] if _TRANSPOSED.search(name) else shape,
            tuple(tensor.get_shape()),
            tensor.get_dtype(),
        )
    return stored, keys


def _open(folder: Path, stack: ExitStack) -> tuple[dict[str, safe_open], int]:
    """The file that holds each key, and the total size in bytes. The files are model.safetensors
    or the shards named by the index."""
    if os.path.lexists(folder / FILE):
        file = _open_file(folder / FILE, stack)
        return dict.fromkeys(file.keys(), file), (folder / FILE).stat().st_size
    if not os.path.lexists(folder / INDEX):
        raise InputError(_no_safetensors(folder))
    where = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{quoted(folder / INDEX)} must hold a weight_map from tensors to files")
    listed: dict[str, set[str]] = {}
    for key, name in where.items():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(
                f"{quoted(folder / INDEX)} must name .safetensors files in its folder, "
                f"got {brief(repr(name))}"
            )
        listed.setdefault(name, set()).add(key)
    shards = {name: _open_file(folder / name, stack) for name in listed}
    for name, shard in shards.items():
        if odd := sorted(listed[name] ^ set(shard.keys())):
            raise InputError(
                f"{quoted(folder / INDEX)} must list exactly the tensors of {brief(name)}, "
                f"differs in: {weights.some(odd)}"
            )
    size = sum((folder / name).stat().st_size for name in shards)
    return {key: shards[name] for key, name in where.items()}, size


def _open_file(path: Path, stack: ExitStack) -> safe_open:
    if not os.path.lexists(path):
        raise InputError(f"{quoted(path)} must be a file, got none")
    try:
        files.check_safetensors(path)
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or brief(e)
        raise InputError(f"{quoted(path)} cannot be read: {reason}") from e


def _no_safetensors(folder: Path) -> str:
    """The error message for a folder without safetensors: what is wrong and what to do."""
    if any(folder.glob("pytorch_model*.bin")):
        code = (
            f"from transformers import GPT2LMHeadModel as M; f = {str(folder)!r}; "
            "M.from_pretrained(f).save_pretrained(f)"
        )
        return (
            f"{quoted(folder)} must hold {FILE}, got a pickle, which is not read here; "
            f"convert it: python -c {shlex.quote(code)}"
        )
    return f"{quoted(folder)} must hold {FILE} or {INDEX}, got neither"


def _size(folder: Path, found: dict[str, Any], key: str) -> Any:
    """A size from config.json, under either of its two names, else transformers' default."""
    values = [found[k] for k in (key, _OTHER_NAMES.get(key)) if k in found]
    if len(values) == 2 and values[0] != values[1]:
        raise InputError(
            f"{quoted(folder / CONFIG)}: {key} and {_OTHER_NAMES[key]} must be the same, "
            f"got {brief(values)}"
        )
    return values[0] if values else _DEFAULTS[key]


def _read_json(path: Path) -> dict[str, Any]:
    return files.read_object(quoted(path), path, _MAX_JSON_BYTES)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_atomic(path, json.dumps(content, indent=2) + "\n")
