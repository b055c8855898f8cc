"""Finds nvcc, and chooses the GPU architectures that it compiles for."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import torch

MISSING = (
    "no nvcc: none is on PATH, in $CUDA_HOME/bin or among the pip packages; "
    "pip install 'gpt2-kernels[cuda]', or set NVCC"
)
OLDEST = (8, 0)

# Without a GPU and TORCH_CUDA_ARCH_LIST: A100, H100, and PTX for newer GPUs.
EVERYWHERE = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
)


def find() -> str | None:
    """The path of nvcc: $NVCC, else the first one found on PATH, in $CUDA_HOME, in $CUDA_PATH and
    in the pip packages of CUDA 13; None if there is none."""
    chosen = os.environ.get("NVCC", "").strip()
    if chosen:
        return shutil.which(chosen)
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin" for home in homes if home] + _pip_folders()
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places) or os.devnull)


def _pip_folders() -> list[str]:
    """The folders <site-packages>/nvidia/cu*/bin, where pip packages such as nvidia-cuda-nvcc
    install a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return [str(folder) for root in roots for folder in sorted(Path(root).glob("cu[0-9]*/bin"))]


def architectures() -> tuple[str, ...]:
    """nvcc's flags for the GPUs in TORCH_CUDA_ARCH_LIST, else for the GPUs of this machine, else
    EVERYWHERE. Raises ValueError for an entry that is not of the form 8.0, 9.0a or 9.0+PTX, or that
    is older than OLDEST."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if wanted:
        return tuple(flag for entry in wanted for flag in _of_entry(entry))
    if torch.version.hip is not None or not torch.cuda.is_available():
        return EVERYWHERE
    present = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return tuple(
        _gencode(*capability) for capability in sorted(set(present)) if capability >= OLDEST
    )


def _of_entry(entry: str):
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not like 8.0, 9.0a or 9.0+PTX")
    major, minor, variant, ptx = found.groups()
    name = f"{major}{minor}{variant}"
    yield f"-gencode=arch=compute_{name},code=sm_{name}"
    if ptx:
        yield f"-gencode=arch=compute_{name},code=compute_{name}"


def _gencode(major: int, minor: int) -> str:
    name = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    return f"-gencode=arch=compute_{name},code=sm_{name}"
