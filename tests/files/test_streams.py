"""Standard streams that are closed, on a full disk, or pipes without a reader. Lost output on
stderr ends nothing, and there is never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from runs import FULL, TEXT, flags, options, told

from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.train.start import train

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs Linux")


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return "text.txt"


def full():
    return FULL.open("w", buffering=1)


def without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def closed():
    with Path(os.devnull).open("w") as file:
        return file


BROKEN = {"disk": full, "pipe": without_reader, "closed": closed, "none": lambda: None}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_training_goes_on_without_stderr(broken, text, tmp_path, monkeypatch):
    """Training ended at the first line that could not be written, without a checkpoint or an
    error."""
    stream = broken()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["train", *flags(out="run", steps=2)]) == 0
    assert sys.stderr is stream
    assert train(options(text, out="run2", steps=2, sample_tokens=0)) == 0
    for run in ("run", "run2"):
        assert checkpoint.read(tmp_path / run / checkpoint.FILE)[1]["step"] == 2


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_an_error_without_stderr_keeps_its_code(broken, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", broken())
    assert main(["trian"]) == 2
    assert capsys.readouterr().out == "", "print(file=None) writes to stdout"


@pytest.mark.parametrize("stdout", [None, "closed"])
def test_a_stdout_that_is_closed(stdout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stdout and closed())
    assert main(["--version"]) == 1
    line = "gpt2: error: standard output cannot be written: Bad file descriptor"
    assert told(capsys) == line
    assert main(["trian"]) == 2


@pytest.mark.parametrize("stdin", [None, "closed"])
def test_a_stdin_that_is_closed(stdin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", stdin and closed())
    for command in (
        ["prepare", "-", "--tokenizer", "byte", "--out", "shards"],
        ["train", "--data", "-"],
        ["sample", "run", "--prompts", "-"],
    ):
        assert main(command) == 2
        assert told(capsys).endswith(": standard input cannot be read: it is closed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("redirections", "code"),
    [("2>/dev/full", 2), ("2>&- >&- <&-", 2)],
)
def test_a_program_whose_error_cannot_be_written(redirections, code):
    """Python exits with 120 if it cannot flush."""
    command = f'exec "$0" -m gpt2 trian {redirections}'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT)
    assert done.returncode == code
