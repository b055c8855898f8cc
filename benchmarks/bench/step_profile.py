"""Splits the time of a training step into parts: matrix products, attention, norms, ...

On a GPU each kernel of torch.profiler's trace belongs to the part whose pattern is in its name;
gaps are times without a kernel, between the first and the last. On a CPU the parts are the
operators' own times; gaps are the rest: Python, and what torch.compile's code does not report.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 3
GAPS = "gaps"
# The first pattern found in a name decides: names of fused kernels list all their operations
PARTS = {
    "optimizer": r"adam|multi_tensor",
    "attention": r"attn|attention|fmha|flash|sdpa|flex|decode",
    "loss": r"cross_entropy|nll|log_softmax|logsumexp|softmax",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|addmm|linear_pointwise|mkldnn_linear"
                       r"|splitk|::(mm|bmm|mv|matmul|linear)\b|tem_fused",
    "norms": r"layer_?norm|var_mean|GammaBeta|cuCompute|rms_?norm",
    "GELU": r"gelu|tanh",
}  # fmt: skip
COMPILED = {re.compile(pattern, re.IGNORECASE): part for part, pattern in PARTS.items()}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # trace categories that occupy the GPU


def part_of(name: str) -> str:
    return next((part for pattern, part in COMPILED.items() if pattern.search(name)), "other")


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """part -> ms of one step, the mean of several steps; the parts add up to the step."""
    if device.type == "cuda":
        activity = ProfilerActivity.CUDA  # recording CPU operators would slow the step
        torch.cuda.synchronize(device)
    else:
        activity = ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall_us = (time.perf_counter() - start) * 1e6
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        parts = of_trace(events)
    else:
        own = [(e.key, e.self_cpu_time_total) for e in profiler.key_averages()]
        parts = summed(own)
        parts[GAPS] = max(0.0, wall_us - sum(parts.values()))
    return {part: us / 1e3 / STEPS for part, us in parts.items()}


def of_trace(events: list[dict]) -> dict[str, float]:
    """part -> µs on the GPU in a Chrome trace, including the gaps."""
    ran = [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_GPU]
    parts = summed((e["name"], e["dur"]) for e in ran)
    idle, until = 0.0, None
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in ran):
        if until is not None and start > until:
            idle += start - until
        until = end if until is None else max(until, end)
    return parts | {GAPS: idle}


def summed(times) -> dict[str, float]:
    """part -> total of the (name, time) pairs; every part is included."""
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for name, us in times:
        parts[part_of(name)] += us
    return parts


def table(profiles: dict[str, dict[str, float]]) -> str:
    """Text of contender -> ms per part: a column per part, the share of the step in brackets."""
    if not profiles:
        return ""
    parts = list(next(iter(profiles.values())))
    lines = [f"  {'ms of a step':16}" + "".join(f"{part:>18}" for part in parts)]
    for name, ms in profiles.items():
        whole = sum(ms.values()) or 1.0
        cells = "".join(f"{f'{ms[p]:.2f} ({100 * ms[p] / whole:.0f} %)':>18}" for p in parts)
        lines.append(f"  {name:16}{cells}")
    return "\n".join(lines)
