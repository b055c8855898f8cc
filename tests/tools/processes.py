"""Runs Python, a script or the kernels' command line in a new process, or in this process."""

import os
import subprocess
import sys
from pathlib import Path

from gpt2.kernels import __main__ as command_line

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def run_python(code, *flags, cwd=ROOT, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, env=env
    )


def run(*command, **env):
    """Runs a command in a new process, without the TRITON_INTERPRET that conftest set here."""
    # Without PYTEST_XDIST_*: pytest-benchmark in a worker's child would take itself for a worker
    # and give up
    left_out = ("TRITON_INTERPRET", "PYTEST_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    env = inherited | {"OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


def run_command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["kernels", *map(str, arguments)])
    try:
        return command_line.main()
    except SystemExit as stopped:
        return stopped.code
