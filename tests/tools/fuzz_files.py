"""Feeds spoilt files to every reader, in child processes that may die.

    python tests/tools/fuzz_files.py --files 1000000 --workers 2 --keep /tmp/offenders
    python tests/tools/fuzz_files.py --only nanogpt:1234      one file again, with its traceback

A file must be read, or refused with InputError or OSError in one line. Anything else is an offence:

    crash       a signal ended the process
    hang        more than 2 s of CPU time, or 20 s of wall time
    traceback   another exception
    message     a refusal of more than one line or of more than 1,000 characters
    memory      more memory than twice the file's size and 16 MiB (RLIMIT_DATA; the fixed part is
                what Python, PyTorch and the libraries need for the smallest file)

The system enforces the limits: timers and RLIMIT_DATA also apply inside C, C++ and Rust. A worker
is a fork of this process, so that nothing is imported again. It reads a chunk of the files of one
target; if a file kills it, another worker goes on after that file. The exit code is 1 if there was
an offence. The last line of the output is a summary.
"""

import argparse
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import tiktoken
import torch
from targets import TARGETS, make_good, no_encoding, spoilt

from gpt2.errors import InputError

CPU_SECONDS, CLOCK_SECONDS = 2.0, 20.0
ROOM = 2**24  # bytes of memory allowed for reading the smallest file
CHUNK = 500  # files per worker
LONGEST = 1000  # characters of a refusal
OFFENCES = ("crash", "hang", "traceback", "message", "memory")
_TIMERS = {signal.SIGPROF: "hang", signal.SIGALRM: "hang"}


def judge(read: Callable[[], object], size: int) -> tuple[str, str]:
    """Reads a file of `size` bytes; returns the outcome and its message. "read" and "refused" are
    correct outcomes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + 2 * size + ROOM, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    error = None
    try:
        read()
    except BaseException as e:
        error = e
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    if error is None:
        return "read", ""
    return _judge_error(error)


def _judge_error(error: BaseException) -> tuple[str, str]:
    causes, e = [], error
    while e is not None and len(causes) < 20:
        causes.append(e)
        e = e.__cause__ or e.__context__
    message = str(error)
    if any(isinstance(e, MemoryError) or "allocate memory" in str(e) for e in causes):
        return "memory", message
    if not isinstance(error, (InputError, OSError)):
        return "traceback", "".join(traceback.format_exception(error))
    if "\n" in message or len(message) > LONGEST:
        return "message", message
    return "refused", message


def _data_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


class Work:
    """Counts the outcomes of all workers in memory that they share with this process."""

    def __init__(self, good: Path, keep: Path | None, targets=TARGETS, spoil=spoilt):
        self.good, self.keep, self.targets, self.spoil = good, keep, targets, spoil
        self.counts: Counter[str] = Counter()
        self.offenders: list[str] = []

    def run(self, chunks: Iterator[tuple[str, int, int]], workers: int) -> None:
        """Reads the chunks (target, first file, end) in `workers` processes at a time."""
        running: dict[int, _Worker] = {}
        left: list[tuple[str, int, int]] = []
        while True:
            while len(running) < workers:
                chunk = left.pop() if left else next(chunks, None)
                if chunk is None:
                    break
                worker = _Worker(self, *chunk)
                running[worker.pid] = worker
            if not running:
                return
            pid, status = os.waitpid(-1, 0)
            if pid in running and (rest := self.collect(running.pop(pid), status)):
                left.append(rest)

    def collect(self, worker: "_Worker", status: int) -> tuple[str, int, int] | None:
        """Adds a worker's counts. If the worker died, returns the rest of its chunk."""
        n, counts, lines = worker.results()
        self.counts.update(counts)
        self.offenders += lines
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return None
        what = _TIMERS.get(os.WTERMSIG(status), "crash") if os.WIFSIGNALED(status) else "crash"
        self.counts[what] += 1
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "an exit"
        self.offenders.append(f"{what} {worker.target}:{n}: {ended}")
        self.save(worker.target, n)
        return (worker.target, n + 1, worker.end) if n + 1 < worker.end else None

    def save(self, target: str, n: int) -> None:
        if self.keep is not None:
            (self.keep / f"{target}-{n}").write_bytes(self.spoil(target, n, self.good))


class _Worker:
    """A fork that reads files first … end - 1 of a target, in a copy of the folder of good
    files."""

    WIDTH = 2**16  # bytes of shared memory: file number, counts, offenders

    def __init__(self, work: Work, target: str, first: int, end: int):
        self.work, self.target, self.first, self.end = work, target, first, end
        self.shared = mmap.mmap(-1, self.WIDTH)
        self.write(first, Counter(), [])
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_fast_folder()))
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = self.read()
            finally:
                os._exit(code)

    def write(self, n: int, counts: Counter[str], lines: list[str]) -> None:
        text = repr((n, dict(counts), lines[:20])).encode()[: self.WIDTH - 8]
        self.shared[: 8 + len(text)] = len(text).to_bytes(8, "little") + text

    def results(self) -> tuple[int, dict[str, int], list[str]]:
        import ast

        size = int.from_bytes(self.shared[:8], "little")
        found = ast.literal_eval(self.shared[8 : 8 + size].decode())
        self.shared.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return found

    def read(self) -> int:
        for each in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(each, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(os.devnull, "wb") as null:  # output of a library before it dies
            os.dup2(null.fileno(), 2)
        folder = self.folder / "good"
        shutil.copytree(self.work.good, folder)
        target = self.work.targets[self.target]
        path = folder / target.file
        counts: Counter[str] = Counter()
        lines: list[str] = []
        for n in range(self.first, self.end):
            self.write(n, counts, lines)
            content = self.work.spoil(self.target, n, self.work.good)
            path.write_bytes(content)
            what, message = judge(lambda: target.read(folder), len(content))
            counts[what] += 1
            if what in OFFENCES:
                self.work.save(self.target, n)
                last = message.strip().splitlines() or [""]
                lines.append(f"{what} {self.target}:{n}: {last[-1][:200]}")
        self.write(self.end, counts, lines)
        return 0


def _fast_folder() -> str | None:
    """A memory file system, or None."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def chunks(files: int, start: int = 0, targets=TARGETS) -> Iterator[tuple[str, int, int]]:
    """File numbers for all targets, mixed, in proportion to the weights of the targets."""
    total = sum(target.files for target in targets.values())
    ends = {name: start + -(-files * t.files // total) for name, t in targets.items()}
    at = dict.fromkeys(targets, start)
    while any(at[name] < ends[name] for name in targets):
        for name in targets:
            if at[name] < ends[name]:
                end = min(at[name] + CHUNK, ends[name])
                yield name, at[name], end
                at[name] = end


def summary(counts: Counter[str], seconds: float) -> str:
    total = sum(counts.values())
    offences = ", ".join(f"{counts[name]:,} {name}" for name in OFFENCES)
    return (
        f"{total:,} files in {seconds:,.0f} s, {total / seconds:,.0f} files/s: "
        f"{counts['read']:,} read, {counts['refused']:,} refused, {offences}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--files", type=int, default=100_000, help="how many, over all targets")
    add("--start", type=int, default=0, help="the number of the first file of each target")
    add("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    add("--keep", type=Path, help="folder for the offenders")
    add("--target", choices=TARGETS, action="append", help="these alone")
    add("--only", metavar="TARGET:N", help="read one file in this process")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tiktoken.get_encoding = no_encoding
    if flags.keep is not None:
        flags.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-good-", dir=_fast_folder()) as folder:
        good = Path(folder) / "good"
        good.mkdir()
        make_good(good)
        for target in TARGETS.values():  # imports everything before any fork
            if target.is_read:
                target.read(good)
        if flags.only:
            target, _, n = flags.only.partition(":")
            path = good / TARGETS[target].file
            path.write_bytes(spoilt(target, int(n), good))
            print(*judge(lambda: TARGETS[target].read(good), path.stat().st_size))
            return 0
        targets = {name: TARGETS[name] for name in flags.target or TARGETS}
        work = Work(good, flags.keep)
        start = time.perf_counter()
        work.run(chunks(flags.files, flags.start, targets), flags.workers)
    print(*sorted(work.offenders), sep="\n")
    print(summary(work.counts, time.perf_counter() - start))
    return int(any(work.counts[name] for name in OFFENCES))


if __name__ == "__main__":
    sys.exit(main())
