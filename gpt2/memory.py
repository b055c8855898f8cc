"""Lower bounds of the memory that a computation needs, compared with the memory that is free.

Work that cannot fit is refused before it starts. Work that fits is never refused.

    P parameters   L layers   B windows   T tokens   C features   V vocabulary
"""

import contextlib
import os
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows: no such limits
    resource = None

from .config import Config
from .errors import InputError

_MEMINFO = Path("/proc/meminfo")
_PAGES = Path("/proc/self/statm")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def check_fits(subject: str, need: int, device: torch.device, what: str) -> None:
    """Raises InputError if device has less than `need` bytes free. The message begins with subject,
    such as "batch_size must be smaller, got 9"; what names the work that needs the memory."""
    free_bytes = available(device)
    if free_bytes is not None and need > free_bytes:
        raise InputError(
            f"{subject}: {what} takes at least {_gigabytes(need)} of memory, "
            f"{device} has {_gigabytes(free_bytes)}"
        )


def check_training(
    config: Config,
    *,
    batch_size: int,
    grad_accum: int,
    fast: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises InputError, naming options, values and memory, if a run cannot fit on device."""
    state_bytes = 16 * parameters(config)  # weights, gradients, and AdamW's two moments in float32
    check_fits(
        _smaller_model(config), state_bytes, device, f"training {parameters(config):,} parameters"
    )
    of_tokens = f"windows of {config.block_size} tokens"
    saved = batch_size * activations(config, fast=fast, itemsize=dtype.itemsize)
    # The gradients, a quarter of that, grow while activations are freed.
    check_fits(
        f"batch_size must be smaller, got {batch_size}",
        state_bytes * 3 // 4 + saved,
        device,
        f"a step over {batch_size:,} {of_tokens}",
    )
    windows = batch_size * grad_accum
    smaller = (
        f"batch_size must be smaller, got {batch_size}"
        if batch_size >= grad_accum
        else f"grad_accum must be smaller, got {grad_accum}, at batch_size {batch_size}"
    )
    check_fits(
        smaller,
        windows * config.block_size * 3 * 8,  # drawn as one array, then x and y, int64
        torch.device("cpu"),
        f"a batch of {windows:,} {of_tokens}",
    )


def check_inference(config: Config, B: int, T: int, *, itemsize: int, device: torch.device) -> None:
    """Raises InputError, naming batch_size, if a forward over T tokens of B sequences cannot fit on
    device. Counts the input of one MLP and the input of its GELU."""
    check_fits(
        f"batch_size must be smaller, got {B}",
        B * T * 5 * config.n_embd * itemsize,
        device,
        f"a forward pass over {B:,} windows of {T} tokens",
    )


def check_cache(config: Config, B: int, T: int, *, itemsize: int, device: torch.device) -> None:
    """Raises InputError, naming batch_size, if the keys and values of T tokens of B sequences
    cannot fit on device."""
    check_fits(
        f"batch_size must be smaller, got {B}",
        config.n_layer * B * T * 2 * config.n_embd * itemsize,
        device,
        f"caching the keys and values of {B:,} sequences of {T} tokens",
    )


def _smaller_model(config: Config) -> str:
    """The option that would make the model smaller."""
    in_blocks = config.n_layer * 12 * config.n_embd
    if max(config.block_size, config.vocab_size) <= in_blocks:
        return f"n_layer and n_embd must be smaller, got {config.n_layer} and {config.n_embd}"
    name = "block_size" if config.block_size >= config.vocab_size else "vocab_size"
    return f"{name} must be smaller, got {getattr(config, name)}, at n_embd {config.n_embd}"


def parameters(config: Config) -> int:
    """The number of parameters P; the tied head counts once."""
    C = config.n_embd
    return (config.vocab_size + config.block_size + 2) * C + config.n_layer * (12 * C + 13) * C


def activations(config: Config, *, fast: bool, itemsize: int) -> int:
    """The least number of bytes per window that are saved for the backward: in each block qkv, the
    attention's output and the GELU's input; and without fast, the logits."""
    T, C = config.block_size, config.n_embd
    logits = 0 if fast else T * config.vocab_size
    return itemsize * (config.n_layer * 8 * T * C + logits)


def available(device: torch.device) -> int | None:
    """Free bytes of device, or None if unknown. For the CPU this includes swap, and respects the
    limits of the container and of ulimit -v."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free() if device.type == "cpu" else None


def free() -> int | None:
    """Free bytes of main memory, or None if unknown."""
    try:
        kilobytes = {
            name: int(value.split()[0])
            for name, value in (
                line.split(":") for line in _MEMINFO.read_text().splitlines() if line.strip()
            )
        }
        swap = 1024 * kilobytes["SwapFree"]
        unused = 1024 * kilobytes["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):  # not Linux
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    return min([min([unused, *_cgroup_bytes_left()]) + swap, *_address_bytes_left()])


def _address_bytes_left() -> list[int]:
    """Bytes left by the limit on this process's addresses (ulimit -v), if there is one."""
    rooms = []
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(_PAGES.read_text().split()[0]) * resource.getpagesize()
        if limit != resource.RLIM_INFINITY:
            rooms.append(max(limit - used, 0))
    return rooms


def _cgroup_bytes_left() -> list[int]:
    """Bytes left in each control group of this process and in its parents."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:  # version 2
            root, files, prefix = _CGROUPS, ("memory.max", "memory.current"), ""
        elif controllers == "memory":
            root, prefix = _CGROUPS / "memory", "total_"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / own.strip("/")
        while folder.is_relative_to(root):
            if (room := _bytes_left(folder, *files, prefix)) is not None:
                rooms.append(room)
            folder = folder.parent
    return rooms


def _bytes_left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes left in a control group; None without a limit. Cached files count as free."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {name: int(value) for name, value in pairs}
    except (OSError, ValueError):  # "max", or a group that this container does not show
        return None
    files = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
    return max(most - used + files, 0)


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB"
