"""nvcc: where it is, and the GPUs that it compiles for."""

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

# Where neither a GPU nor TORCH_CUDA_ARCH_LIST says which: A100, H100, and PTX for what came later.
EVERYWHERE = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
)


def find() -> str | None:
    """$NVCC, else the first of PATH, $CUDA_HOME, $CUDA_PATH and the pip packages of CUDA 13 that
    has one."""
    chosen = os.environ.get("NVCC", "").strip()
    if chosen:
        return shutil.which(chosen)
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin" for home in homes if home] + _pip_folders()
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places) or os.devnull)


def _pip_folders() -> list[str]:
    """<site-packages>/nvidia/cu13/bin: a toolkit as nvidia-cuda-nvcc and its like leave it."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    return [str(folder) for root in roots for folder in sorted(Path(root).glob("cu[0-9]*/bin"))]


def architectures() -> tuple[str, ...]:
    """nvcc's flags for the GPUs that are to run it: those of TORCH_CUDA_ARCH_LIST, else the present
    ones, else EVERYWHERE. ValueError for an entry that is not like 8.0, 9.0a or 9.0+PTX, or older.
    """
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
