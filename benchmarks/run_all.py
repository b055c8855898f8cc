"""Everything about this machine in one command: build, check, measure all, report.

    python benchmarks/run_all.py --out results/           # 8 minutes on a GPU, an hour on a CPU
    python benchmarks/run_all.py --out results/ --quick   # one shape each
    python benchmarks/run_all.py --out results/ --only train_step --no-tests --minutes 9

DIR gets environment.json, a JSON per script (as benchmarks/results has them), the tests' JSON, a
log per job, plots, and report.md, written anew after every job. Each script is a process of its
own with a share of the time that is left: a crash, a hang or an illegal access costs the contender
that was running, and is reported. What no time was left for is "skipped: out of time". The exit
code is 1 if anything failed or was wrong, else 0.

On a GPU, what torch.compile makes for the peers is compiled first, for all scripts side by side,
while the libraries are built. The kernels that the compiler chose by timing them meanwhile are
chosen again, when nothing else runs.
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

import jobs
import machine
import plan
import plots
import run_report
import torch
from options import Parser, positive
from record import write

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
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SCRIPTS)}")
        return text.split(",")

    def count(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
        return int(text)

    parser.add_argument("--out", type=folder, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="one shape each, few repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where present")
    parser.add_argument(
        "--minutes", type=positive, help="for all; default: 8 on a GPU, 60 on a CPU"
    )
    parser.add_argument("--only", type=scripts, metavar="SCRIPT,...", help="default: all")
    parser.add_argument("--no-tests", action="store_true", help="measure without a test run first")
    parser.add_argument("--threads", type=count, help="of a CPU; default: PyTorch's")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: an interpreted kernel has no speed to measure")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads and options.device == "cuda":
        parser.error("--threads is for a CPU: on a GPU no thread of the CPU computes")
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
    slug = machine.slug(about)
    plan_ = planned(options.device, options.quick, options.only, not options.no_tests)
    outcomes, kernels = [], ""

    def done(outcome: jobs.Outcome) -> None:
        outcomes.append(outcome)
        reasons = "".join(f"\n    {reason}" for reason in outcome.reasons)
        print(f"{outcome.job}: {outcome.status}, {outcome.seconds} s{reasons}", flush=True)
        write(out / "outcomes.json", {"schema": 1, "outcomes": [asdict(o) for o in outcomes]})
        text = run_report.render(about, kernels, outcomes, time.monotonic() - start)
        (out / "report.md").write_text(text)

    def run(job: jobs.Job, seconds: float, until: float = deadline, more=NOTHING) -> jobs.Outcome:
        if min(seconds, until - time.monotonic()) < 1:
            return jobs.Outcome(job.name, "skipped", [jobs.OUT_OF_TIME])
        log = out / f"{job.name}.log"
        return jobs.run(job, seconds, min(deadline, until), log, env | more)

    print(f"{slug}: {about['device_name']}, {options.minutes:g} minutes, to {out}", flush=True)
    builds, compilations = plan_.builds(out, slug), plan_.compilations(out, slug)
    compiled_until = start + plan.COMPILE_SHARE * (deadline - start)

    def compiled(job: jobs.Job) -> jobs.Outcome:
        """Each job uses one compiler thread. Failures are reported later, when it is timed."""
        if job.after_builds:  # which backends our models take depends on the libraries
            futures.wait(building)
        outcome = run(job, deadline - time.monotonic(), compiled_until, ONE_COMPILER)
        outcome.status = "skipped" if outcome.status == "failed" else outcome.status
        return outcome

    with futures.ThreadPoolExecutor(max_workers=len(builds) + (os.cpu_count() or 1)) as pool:
        building = [pool.submit(run, job, deadline - time.monotonic()) for job in builds]
        compiling = [pool.submit(compiled, job) for job in compilations]
        try:
            for future in (*building, *compiling):
                done(future.result())
        except BaseException:  # an interrupt ends what runs, and nothing more begins
            pool.shutdown(wait=False, cancel_futures=True)
            jobs.stopping.set()
            raise
    choose_again(cache)
    kernels = kernel_report(env) if builds else ""
    for job in plan_.tests(out, slug):
        left = deadline - time.monotonic()
        done(run(job, min(job.most_s, left), time.monotonic() + job.most_s + 60))
    benches = plan_.benches(out, slug)
    for i, job in enumerate(benches):
        seconds = jobs.budget(benches[i:], deadline)
        done(run(job, seconds, time.monotonic() + seconds + job.grace_s))
    try:
        plots.draw(out, [o.json for o in outcomes if o.json])
    except ImportError as error:
        done(jobs.Outcome("plots", "skipped", [str(error)]))
    except Exception as error:  # the figures are there all the same
        done(jobs.Outcome("plots", "failed", [f"{type(error).__name__}: {error}"]))
    print(f"{out / 'report.md'}, {time.monotonic() - start:.0f} s")
    return 1 if any(o.status == "failed" for o in outcomes) else 0


def caches(cache: Path) -> dict[str, str]:
    """The environment in which PyTorch's and FlashAttention-4's compilers keep what they make."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(cache / "flash-attention"),
    }


def choose_again(cache: Path) -> None:
    """Forgets which of several kernels was the fastest while other processes ran beside it; what
    was compiled stays."""
    for choice in cache.rglob("*.best_config"):
        choice.unlink()


def environment(options) -> dict:
    """Of the jobs."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if importlib.util.find_spec("gpt2") is None:  # not installed: run from the tree
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(jobs.ROOT), env.get("PYTHONPATH")]))
    if options.threads:
        env |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    return env


def described(device: str, env: dict) -> dict:
    """machine.report in a process of its own: this one never touches the GPU."""
    text = output(jobs.python("machine.py", device), env)
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"run_all.py: error: machine.py {device} failed: {text[-300:]}") from None


def kernel_report(env: dict) -> str:
    return output((sys.executable, "-m", "gpt2.kernels"), env)


def output(command: tuple[str, ...], env: dict) -> str:
    try:
        done = subprocess.run(command, cwd=jobs.ROOT, env=env, capture_output=True, text=True,
                              timeout=120)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no answer within 120 s"
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
