"""The compilations at the start of run_all.py leave enough time for the benchmarks."""

import dataclasses
import sys
import threading

import pytest
import run_all
from bench.run import (
    plan,
    processes,
)


@pytest.fixture
def whole_run(tmp_path, monkeypatch):
    """run(planned, *options) -> the report of run_all.py, which must end with exit code 0."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run_all, "described", lambda device, env: {
        "device": "cpu", "device_name": "Abacus 3", "threads": 1, "cpu_capability": "AVX2",
    })  # fmt: skip
    out = tmp_path / "out"

    def run(planned, *argv):
        assert run_all.main(["--out", str(out), "--device", "cpu", *argv], planned) == 0
        return (out / "report.md").read_text()

    return run


def stand_in(tmp_path, name, code):
    """A job of a few lines of Python, which get the compiler's cache as `cache`."""
    file = tmp_path / f"{name}.py"
    head = "import os, pathlib\ncache = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
    file.write_text(head + code)
    return processes.Job(name, (sys.executable, str(file)), stall_s=60.0, resumes=False)


def test_compilations_come_first_and_cost_nothing_when_they_fail(tmp_path, whole_run, monkeypatch):
    """Choices that were timed meanwhile are dropped; compiled kernels are kept."""
    compiles = (
        "assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '1'\n"
        "(cache / 'ab').mkdir()\n"
        "for name in ('code.py', 'k.best_config'): (cache / 'ab' / name).touch()\n"
    )
    looks = (
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "(out / 'seen').write_text(' '.join(p.name for p in cache.rglob('*.*')))\n"
        f"(out / 'threads').write_text(str('TORCHINDUCTOR_COMPILE_THREADS' in os.environ))\n"
    )

    def planned(*args):
        return plan.Plan(
            builds=[],
            benches=[stand_in(tmp_path, "bench", looks)],
            compilations=[
                stand_in(tmp_path, "compiles", compiles), stand_in(tmp_path, "fails", "exit(5)"),
            ],
        )  # fmt: skip

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    report = whole_run(planned)
    assert (tmp_path / "seen").read_text() == "code.py"
    assert (tmp_path / "threads").read_text() == "False"
    assert "| fails | skipped |" in report and "exit code 5" in report
    assert "| compiles | ok |" in report
    lines = [line for line in report.splitlines() if line.startswith(("| compiles", "| bench"))]
    assert [line.split()[1] for line in lines] == ["compiles", "bench"]


def test_compiling_ends_in_time_for_the_benchmarks(tmp_path, whole_run):
    """Compilations that never end leave the benchmarks their share."""

    def planned(*args):
        return plan.Plan(
            builds=[],
            benches=[stand_in(tmp_path, "bench", "")],
            compilations=[
                stand_in(tmp_path, "endless", "import time\nwhile True: time.sleep(1)")
            ],
        )  # fmt: skip

    report = whole_run(planned, "--minutes", "0.1")
    assert "| endless | skipped |" in report and "| bench | ok |" in report


def test_what_outlasts_its_share_is_ended(tmp_path, whole_run):
    """A search of two minutes in the first script left no time for the others."""

    def planned(*args):
        endless = stand_in(tmp_path, "endless", "import time\nwhile True: time.sleep(1)")
        return plan.Plan(
            builds=[],
            benches=[
                dataclasses.replace(endless, share=0.1, grace_s=0.5), stand_in(tmp_path, "next", "")
            ],
            compilations=[],
        )  # fmt: skip

    report = whole_run(planned, "--minutes", "0.2")
    assert "| endless | skipped |" in report and "| next | ok |" in report
    on_gpu = plan.planned("cuda", False, None, tmp_path, "abacus").benches
    assert all(job.grace_s == plan.GRACE_S for job in on_gpu)


def test_what_depends_on_the_libraries_is_compiled_after_their_build(tmp_path, whole_run):
    """The libraries decide which backends a fast model uses; compiled before, its code would be
    another."""
    built, seen = tmp_path / "built", tmp_path / "seen"
    wait = f"import time\ntime.sleep(0.5)\nopen({str(built)!r}, 'w').close()"
    look = f"import os\nopen({str(seen)!r}, 'w').write(str(os.path.exists({str(built)!r})))"

    def planned(*args):
        fast = dataclasses.replace(stand_in(tmp_path, "fast", look), after_builds=True)
        return plan.Plan(
            builds=[stand_in(tmp_path, "build", wait)],
            benches=[], compilations=[fast],
        )  # fmt: skip

    whole_run(planned)
    assert seen.read_text() == "True"
    fast = [
        job for job in plan.planned("cuda", False, None, tmp_path, "abacus").compilations
        if job.after_builds
    ]  # fmt: skip
    assert fast and all("--backends fast-" in " ".join(job.command) for job in fast)


def test_an_interrupt_ends_what_compiles_and_begins_nothing(tmp_path, whole_run, monkeypatch):
    monkeypatch.setattr(processes, "stopping", threading.Event())

    def planned(*args):
        endless = [
            stand_in(tmp_path, f"endless-{i}", f"(pathlib.Path({str(tmp_path)!r}) / 'begun-{i}')"
                     ".touch()\nimport time\nwhile True: time.sleep(1)")
            for i in range(40)
        ]  # fmt: skip
        failing = dataclasses.replace(stand_in(tmp_path, "build", ""), command=None)
        return plan.Plan(
            builds=[failing], benches=[],
            compilations=endless,
        )  # fmt: skip

    with pytest.raises(TypeError):  # like an interrupt in the middle of the first phase
        whole_run(planned)
    assert len(list(tmp_path.glob("begun-*"))) < 40
