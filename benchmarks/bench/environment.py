"""Describes the machine of a measurement: devices, drivers, and versions of libraries.

python benchmarks/bench/environment.py [cpu|cuda]      # the whole report as JSON
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

# Package names of the peers; peers inside PyTorch have its version
PACKAGES = ("liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "quack-kernels",
            "transformers", "ctranslate2", "onnxruntime", "tiktoken")  # fmt: skip
SMI = ("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem",
       "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu", "memory.total",
       "persistence_mode", "mig.mode.current")  # fmt: skip


def environment(device: torch.device) -> dict:
    """The environment that every result is stored with."""
    on_gpu = device.type == "cuda"
    spec = importlib.util.find_spec("triton")
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if spec else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "peers": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "commit": _git("describe", "--always", "--abbrev=12"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),  # uncommitted changes
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def report(device: torch.device) -> dict:
    """environment(), and the details that only run_all.py's report shows."""
    about = environment(device) | {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "nvidia_smi": nvidia_smi(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return about


def nvidia_smi() -> dict | str:
    """Driver, clocks and power from nvidia-smi, or the reason why it gives none."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    answer = _output("nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader")
    values = [value.strip() for value in answer.partition("\n")[0].split(",")]
    return dict(zip(SMI, values, strict=True)) if len(values) == len(SMI) else answer.strip()


def slug(about: dict) -> str:
    """A short name for files: h200, h100, epyc-avx512-2thread."""
    words = re.findall(r"[A-Za-z0-9]+", re.sub(r"\((R|TM)\)", "", about["device_name"]))
    words = [w.lower() for w in words if w.lower() not in ("nvidia", "amd", "intel", "geforce")]
    if about["device"] == "cuda":
        model = [w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)]
        return (model or words or ["gpu"])[0]
    capability = about["cpu_capability"].lower()
    isa = "avx512" if "avx512" in capability else "avx2" if "avx2" in capability else "scalar"
    return f"{(words or ['cpu'])[0]}-{isa}-{about['threads']}thread"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*command: str) -> str | None:
    answer = _output("git", "-C", str(Path(__file__).parent), *command)
    return answer.strip() or None


def _output(*command: str) -> str:
    """The output of the command; "" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    default = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(report(torch.device(*(sys.argv[1:] or [default])))))
