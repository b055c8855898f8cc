"""The fuzzer of all readers: two thousand files, and the offences that it must report."""

import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT
from targets import Target

from gpt2.errors import InputError

TOOL = ROOT / "tests" / "tools" / "fuzz_files.py"
import fuzz_files  # noqa: E402


def test_two_thousand_files_hurt_no_reader(tmp_path):
    """The files are always the same. More by hand: --files 1000000."""
    done = subprocess.run(
        [sys.executable, TOOL, "--files", "2000", "--workers", "2", "--keep", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith("0 crash, 0 hang, 0 traceback, 0 message, 0 memory\n")
    assert not any(tmp_path.iterdir())


def hang(folder):
    while True:
        pass


def refuse(message):
    def read(folder):
        raise InputError(message)

    return read


READERS = {
    "read": lambda folder: None,
    "refused": refuse("no"),
    "crash": lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": hang,
    "traceback": lambda folder: {}["x"],
    "message": refuse("a\nb"),
    "memory": lambda folder: bytearray(2**31),
}


@pytest.mark.parametrize("what", READERS)
def test_the_fuzzer_notices(what, tmp_path, monkeypatch):
    """It keeps a file that kills its process, and goes on with the next."""
    monkeypatch.setattr(fuzz_files, "CPU_SECONDS", 0.2)
    good, keep = tmp_path / "good", tmp_path / "keep"
    for folder in (good, keep):
        folder.mkdir()

    def read(folder):
        if (folder / "file").read_bytes() == b"1":
            READERS[what](folder)

    targets = {"t": Target("file", lambda data, rng: data, read, 1)}
    work = fuzz_files.Work(good, keep, targets, lambda target, n, folder: str(n).encode())
    work.run(iter([("t", 0, 3)]), workers=1)
    expected = {"read": 2, what: 1} if what != "read" else {"read": 3}
    assert dict(work.counts) == expected
    kept = [] if what in ("read", "refused") else ["t-1"]
    assert os.listdir(keep) == kept
    assert [line.split(": ")[0] for line in work.offenders] == [f"{what} t:1" for _ in kept]


def test_files_are_shared_out_by_what_a_target_is_worth():
    targets = {"a": Target("a", None, None, 3), "b": Target("b", None, None, 1)}
    found = list(fuzz_files.chunks(2000, start=7, targets=targets))
    assert found == [("a", 7, 507), ("b", 7, 507), ("a", 507, 1007), ("a", 1007, 1507)]
