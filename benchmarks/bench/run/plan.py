"""The jobs of run_all.py, the most important first, because the time may run out."""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.run.processes import Job, python

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Bench:
    """A script with one dtype. share: weight of its share of the remaining time. stall_s: seconds
    without progress after which a contender counts as hanging. quick: the shape of a quick run.
    shapes: those of a whole run; empty for the script's own."""

    script: str
    dtype: str
    share: float
    quick: str
    shapes: str = ""
    stall_s: float = 90.0
    options: tuple[str, ...] = ()


def without(names: str) -> tuple[str, str]:
    """The option that leaves out contenders that tune for more than a minute, or are never the
    best peer. The scripts include them by default."""
    return "--without", names


ON_GPU = [
    Bench("attention", "bfloat16", 34, "16x1024x12x64",
          "16x1024x12x64,8x2048x12x64,4x4096x12x64,2x8192x12x64,32x512x12x64",
          options=without("max-autotune,compiled,eager,sdpa-math,sdpa-efficient,reference")),
    Bench("layer_norm", "bfloat16", 6, "16384x768", "65536x768", options=without("max-autotune")),
    Bench("train_step", "bfloat16", 44, "16x1024", "64x1024,4x1024", 240.0,
          without("max-autotune,transformers")),
    Bench("cross_entropy", "bfloat16", 8, "8192x50257x768", "8192x50257x768",
          options=without("max-autotune")),
    Bench("gelu", "bfloat16", 4, "16384x3072", "65536x3072", options=without("max-autotune")),
    Bench("decode_attention", "bfloat16", 4, "8x1024x12x64", "1x1024x12x64,64x1024x12x64",
          options=without("max-autotune")),
    Bench("generate", "bfloat16", 12, "1x16", "1x16,8x512", 240.0, ("--models", "gpt2")),
    Bench("host", "bfloat16", 3, "1x16x2x16", "1x16x2x16"),
    Bench("attention", "float32", 3, "16x1024x12x64", "16x1024x12x64",
          options=without("max-autotune,compiled")),
    Bench("layer_norm", "float32", 2, "16384x768", "16384x768", options=without("max-autotune")),
]  # fmt: skip
GRACE_S = 15.0  # time beyond its share after which a script on a GPU is ended


def of_cpu(dtype: str) -> list[Bench]:
    """The benches of a CPU, at the shapes of its goals (goals.py)."""
    attention = "4x64x12x64,4x256x12x64,1x1024x12x64,1x4096x4x64"
    return [
        Bench("attention", dtype, 25, "1x256x12x64", attention, 900.0),
        Bench("layer_norm", dtype, 5, "512x768", "2048x768", 900.0),
        Bench("train_step", dtype, 30, "1x64", "1x1024", 1800.0, ("--profile",)),
        Bench("cross_entropy", dtype, 10, "32x50257x768", "256x50257x768", 900.0),
        Bench("gelu", dtype, 5, "256x3072", "2048x3072", 900.0),
        Bench("decode_attention", dtype, 3, "1x256x12x64", stall_s=900.0),
        Bench("generate", dtype, 10, "1x16", "1x16", 900.0),
    ]


HOST = Bench("host", "float32", 2, "1x16x2x16", stall_s=900.0)
ON_CPU = [*of_cpu("float32"), HOST, *of_cpu("bfloat16")]
# Options that reduce a training step to one compiled model
COMPILED_STEPS = [
    ("--backends", "fast-compiled", "--peers", "none"),
    ("--backends", "fast-reduce-overhead", "--peers", "none"),
    ("--peers", "compiled", "--without", "fast-compiled,fast-reduce-overhead"),
    ("--peers", "reduce-overhead", "--without", "fast-compiled,fast-reduce-overhead"),
]
COMPILE_S = 300.0  # limit for the compiled contenders of one shape
COMPILE_SHARE = 0.4  # limit for all compilations, as a share of the whole run's time
MINUTES = {("cuda", False): 8, ("cuda", True): 3, ("cpu", False): 60, ("cpu", True): 10}


@dataclass(frozen=True)
class Plan:
    """Builds and compilations run in parallel, then benches one after the other."""

    builds: list[Job]
    compilations: list[Job]
    benches: list[Job]


def planned(device: str, quick: bool, only: list[str] | None, out: Path, slug: str) -> Plan:
    """The plan for a device. Results go to the folder out; slug, the machine, is in their names."""
    benches = ON_GPU if device == "cuda" else ON_CPU
    if quick:
        benches = [b for b in benches if b.dtype == ("bfloat16" if device == "cuda" else "float32")]
    if only:
        benches = [b for b in benches if b.script in only]
    jobs = [bench_job(b, device, out, slug, quick) for b in benches]
    return Plan(builds(device), compilations(benches, device, quick), jobs)


def builds(device: str) -> list[Job]:
    build = (sys.executable, "-m", "gpt2.kernels", "build")
    options = ("", "--replay", "--cuda") if device == "cuda" else ("", "--replay")
    return [Job(f"build {option}".strip(), (*build, *filter(None, [option])), stall_s=300,
                most_s=300, resumes=False) for option in options]  # fmt: skip


def bench_job(bench: Bench, device: str, out: Path, slug: str, quick: bool) -> Job:
    name = f"{bench.script}-{SHORT[bench.dtype]}"
    path = out / f"{slug}-{name}.json"
    command = (*command_of(bench, device, quick), "--json", str(path))
    grace_s = GRACE_S if device == "cuda" else float("inf")
    return Job(name, command, path, bench.share, grace_s, stall_s=bench.stall_s)


def command_of(bench: Bench, device: str, quick: bool, shapes: str = "") -> tuple[str, ...]:
    shapes = shapes or (bench.quick if quick else bench.shapes)
    more = (*(("--quick",) if quick else ()), *bench.options)
    more += ("--shapes", shapes) if shapes else ()
    return python(f"{bench.script}.py", "--device", device, "--dtype", bench.dtype, *more)


def compilations(benches: list[Bench], device: str, quick: bool) -> list[Job]:
    """Compilation jobs for a GPU: one per script and shape, and one per model of a training step.
    They run in parallel; the slowest come first. None on a CPU: they would share its cores."""
    if device != "cuda":
        return []
    slowest = ("train_step", "generate", "attention")
    order = sorted(benches, key=lambda b: slowest.index(b.script) if b.script in slowest else 9)
    jobs = []
    for b in order:
        if b.script == "host":
            continue
        for shape in (b.quick if quick else b.shapes).split(","):
            command = (*command_of(b, device, quick, shape), "--compile-only")
            name = f"compile-{b.script}-{SHORT[b.dtype]}-{shape}"
            for model in COMPILED_STEPS if b.script == "train_step" else [()]:
                jobs.append(Job("-".join([name, *model[1:2]]), (*command, *model),
                                most_s=COMPILE_S, stall_s=COMPILE_S, resumes=False,
                                after_builds=model[:1] == ("--backends",)))  # fmt: skip
    return jobs
