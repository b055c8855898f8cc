"""Measures this machine: builds the libraries, runs every benchmark, writes one report.

    python benchmarks/run_all.py --out results/           # 8 minutes on a GPU, an hour on a CPU
    python benchmarks/run_all.py --out results/ --quick   # one shape each
    python benchmarks/run_all.py --out results/ --only train_step --minutes 9

DIR gets environment.json, a JSON and a log per script, plots, and report.md, which is rewritten
after every job. Each script is a process with a share of the remaining time. A crash, a hang or an
illegal access is reported and loses only the contender that was running. Work for which no time
was left is "skipped: out of time". The exit code is 1 if anything failed or was wrong, else 0.

On a GPU, torch.compile first compiles the peers of all scripts in parallel, while the libraries are
built. Meanwhile it also times kernels to choose among them; these choices are dropped, and repeated
when nothing else runs.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from dataclasses import asdict
from pathlib import Path

import torch
from bench.environment import slug as slug_of
from bench.options import Parser, positive
from bench.report import plots, run_report
from bench.result_file import write
from bench.run import plan, processes
from bench.run.processes import Job, Outcome

# Additions to a job's environment
NOTHING, ONE_COMPILER = {}, {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
SCRIPTS = ("attention", "layer_norm", "train_step", "cross_entropy", "gelu", "decode_attention",
           "generate", "host")  # fmt: skip


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def folder(text):
        path = Path(text)
        parent = path
        while not parent.exists():
            parent = parent.absolute().parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
        return path.absolute()

    def scripts(text):
        for name in text.split(","):
            if name not in SCRIPTS:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SCRIPTS)}")
        return text.split(",")

    def count(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
        return int(text)

    parser.add_argument("--out", type=folder, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="one shape each, few repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if present")
    parser.add_argument(
        "--minutes", type=positive, help="for all; default: 8 on a GPU, 60 on a CPU"
    )
    parser.add_argument("--only", type=scripts, metavar="SCRIPT,...", help="default: all")
    parser.add_argument("--threads", type=count, help="of a CPU; default: PyTorch's")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: an interpreted kernel has no speed to measure")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads and options.device == "cuda":
        parser.error("--threads needs --device cpu: it has no effect on a GPU")
    options.minutes = options.minutes or plan.MINUTES[options.device, options.quick]
    return options


def main(argv=None, planned=plan.planned) -> int:
    options = parse(argv)
    start = time.monotonic()
    deadline = start + 60 * options.minutes
    out = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"run_all.py: error: --out: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="compiler-cache-") as cache:
        return measured(options, planned, start, deadline, Path(cache))


def measured(options, planned, start: float, deadline: float, cache: Path) -> int:
    out, env = options.out, environment(options) | caches(cache)
    about = described(options.device, env)
    write(out / "environment.json", about)
    slug = slug_of(about)
    plan_ = planned(options.device, options.quick, options.only, out, slug)
    outcomes, kernels = [], ""

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        reasons = "".join(f"\n    {reason}" for reason in outcome.reasons)
        print(f"{outcome.job}: {outcome.status}, {outcome.seconds} s{reasons}", flush=True)
        write(out / "outcomes.json", {"schema": 1, "outcomes": [asdict(o) for o in outcomes]})
        text = run_report.render(about, kernels, outcomes, time.monotonic() - start)
        (out / "report.md").write_text(text)

    def run(job: Job, seconds: float, until: float = deadline, more=NOTHING) -> Outcome:
        if min(seconds, until - time.monotonic()) < 1:
            return Outcome(job.name, "skipped", [processes.OUT_OF_TIME])
        log = out / f"{job.name}.log"
        return processes.run(job, seconds, min(deadline, until), log, env | more)

    print(f"{slug}: {about['device_name']}, {options.minutes:g} minutes, to {out}", flush=True)
    compiled_until = start + plan.COMPILE_SHARE * (deadline - start)

    def compiled(job: Job) -> Outcome:
        """Runs a job with one compiler thread. Failures are reported when the job is timed."""
        if job.after_builds:  # the libraries decide which backends our models use
            futures.wait(building)
        outcome = run(job, deadline - time.monotonic(), compiled_until, ONE_COMPILER)
        outcome.status = "skipped" if outcome.status == "failed" else outcome.status
        return outcome

    with futures.ThreadPoolExecutor(max_workers=len(plan_.builds) + (os.cpu_count() or 1)) as pool:
        building = [pool.submit(run, job, deadline - time.monotonic()) for job in plan_.builds]
        compiling = [pool.submit(compiled, job) for job in plan_.compilations]
        try:
            for future in (*building, *compiling):
                done(future.result())
        except BaseException:  # an interrupt ends the running jobs and starts no more
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stopping.set()
            raise
    choose_again(cache)
    kernels = kernel_report(env) if plan_.builds else ""
    for i, job in enumerate(plan_.benches):
        seconds = processes.budget(plan_.benches[i:], deadline)
        done(run(job, seconds, time.monotonic() + seconds + job.grace_s))
    try:
        plots.draw(out, [o.json for o in outcomes if o.json])
    except ImportError as error:
        done(Outcome("plots", "skipped", [str(error)]))
    except Exception as error:  # the results are complete without plots
        done(Outcome("plots", "failed", [f"{type(error).__name__}: {error}"]))
    print(f"{out / 'report.md'}, {time.monotonic() - start:.0f} s")
    return 1 if any(o.status == "failed" for o in outcomes) else 0


def caches(cache: Path) -> dict[str, str]:
    """Environment variables: cache folders for PyTorch's and FlashAttention-4's compilers."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(cache / "flash-attention"),
    }


def choose_again(cache: Path) -> None:
    """Deletes the choices of the fastest kernel that were timed while other processes ran; keeps
    the compiled kernels."""
    for choice in cache.rglob("*.best_config"):
        choice.unlink()


def environment(options) -> dict:
    """The environment variables of the jobs."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if importlib.util.find_spec("gpt2") is None:  # not installed: run from the tree
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(processes.ROOT), env.get("PYTHONPATH")])
        )
    if options.threads:
        env |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    return env


def described(device: str, env: dict) -> dict:
    """environment.report, run in another process: this one never touches the GPU."""
    text = output(processes.python("bench/environment.py", device), env)
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(
            f"run_all.py: error: environment.py {device} failed: {text[-300:]}"
        ) from None


def kernel_report(env: dict) -> str:
    return output((sys.executable, "-m", "gpt2.kernels"), env)


def output(command: tuple[str, ...], env: dict) -> str:
    try:
        done = subprocess.run(command, cwd=processes.ROOT, env=env, capture_output=True, text=True,
                              timeout=120)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no answer within 120 s"
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
