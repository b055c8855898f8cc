"""Runs jobs as processes that may crash, hang or take too long without harming other jobs.

A job has a share of the remaining time. It is killed, with all its child processes, if it makes no
progress for stall_s seconds or reaches the deadline of the whole run. Progress is a change of its
JSON file. What was running when it died is recorded as failed, and the job is restarted without it
(result_file.py).
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench import result_file

OUT_OF_TIME = "out of time"
LOST = 3  # exit code of a script whose CUDA context is gone: harness.LOST
RESTARTS = 20
stopping = threading.Event()  # ends the jobs of all threads
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Job:
    """A process to run. If it `resumes`, command gets "--seconds S", and "--resume" on restart."""

    name: str
    command: tuple[str, ...]
    json: Path | None = None  # the file of its results, rewritten as it runs
    share: float = 1.0  # weight of its share of the remaining time
    grace_s: float = float("inf")  # time beyond its share for work that has begun
    most_s: float = float("inf")
    stall_s: float = 60.0
    resumes: bool = True
    after_builds: bool = False  # a compilation that depends on the built libraries


@dataclass
class Outcome:
    """How a job ended. status: ok, failed, or skipped for lack of time."""

    job: str
    status: str = "ok"
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0
    json: str | None = None

    def fail(self, *reasons: str) -> None:
        self.status = "failed"
        self.reasons += reasons

    def skip(self, *reasons: str) -> None:
        self.status = "skipped" if self.status == "ok" else self.status
        self.reasons += reasons


def budget(jobs: list[Job], deadline: float) -> float:
    """The seconds that the first of the remaining jobs may take."""
    left = deadline - time.monotonic()
    return min(jobs[0].most_s, left * jobs[0].share / sum(job.share for job in jobs))


def run(job: Job, seconds: float, deadline: float, log: Path, env: dict | None = None) -> Outcome:
    """Runs the job, and restarts it without the contender that killed it. Appends output to `log`;
    deadline is a time of time.monotonic()."""
    outcome, start = Outcome(job.name, json=str(job.json) if job.json else None), time.monotonic()
    if job.resumes and job.json:
        job.json.unlink(missing_ok=True)  # so that the file is of this run
    for again in range(RESTARTS + 1):
        left = seconds - (time.monotonic() - start)
        command = list(job.command)
        if job.resumes:
            command += ["--seconds", f"{max(1.0, left):.0f}", *(["--resume"] if again else [])]
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            code, killed = _watched(command, job, deadline, output, env)
        if killed is None and code == 0:
            break
        if killed is None and code == 1 and job.resumes and _complete(job.json):
            break  # the failures are in its results
        what = killed or _death(code, log)
        died = _blamed(job, what) if job.resumes and job.json else []
        if killed == OUT_OF_TIME:
            outcome.skip(f"{OUT_OF_TIME}{': killed' if not died else ''}", *died)
            break
        outcome.fail(*(died or [what]))
        if not died and code != LOST:
            break
        if left < 1:
            outcome.skip(OUT_OF_TIME)
            break
    _summarize(job, outcome)
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def _watched(command, job: Job, deadline: float, output, env) -> tuple[int, str | None]:
    """(exit code, why it was killed or None)."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        cwd=ROOT, env=env, start_new_session=True,
    )  # fmt: skip
    progress, seen = time.monotonic(), None
    try:
        while process.poll() is None:
            time.sleep(0.05)
            now, stamp = time.monotonic(), _stamp(job.json)
            if stamp != seen:
                progress, seen = now, stamp
            if now >= deadline or stopping.is_set():
                return 0, OUT_OF_TIME
            if now - progress >= job.stall_s:
                return 0, f"no progress in {job.stall_s:.0f} s, killed"
        return process.returncode, None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes
        process.wait()


def _stamp(path: Path | None) -> int | None:
    with contextlib.suppress(OSError, AttributeError):
        return path.stat().st_mtime_ns
    return None


def _death(code: int, log: Path) -> str:
    if code == LOST:
        return "the CUDA context was lost"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"died by {signal.Signals(-code).name}"
    last = log.read_text(errors="replace").strip().splitlines()[-1][:160]
    return f"exit code {code}: {last}"


def _blamed(job: Job, what: str) -> list[str]:
    """Records results for what was running. Running out of time is no failure."""
    status = "skipped" if what == OUT_OF_TIME else "error"
    return result_file.blame(job.json, lambda kind: (status, what))


def failing(row: dict) -> bool:
    return row["kind"] == "backend" and row["status"] in ("wrong", "error")


def _complete(path: Path) -> bool:
    """Whether a script that exited with 1 ran to its end; a traceback has the same exit code."""
    document = result_file.read(path)
    return "running" not in document and any(map(failing, document.get("results", [])))


def _summarize(job: Job, outcome: Outcome) -> None:
    """Adds the failures and the skipped cases in the job's results to its outcome."""
    if not job.resumes or job.json is None:
        return
    rows = result_file.read(job.json).get("results", [])
    for reason in dict.fromkeys(result_file.line(r) for r in rows if failing(r)):
        if reason not in outcome.reasons:
            outcome.fail(reason)
    late = sum(r["status"] == "skipped" for r in rows)
    if late:
        outcome.skip(f"{late} results skipped: {OUT_OF_TIME}")
    if not rows and outcome.status == "ok":
        outcome.fail("it wrote no results")


def python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "benchmarks" / script), *arguments)
