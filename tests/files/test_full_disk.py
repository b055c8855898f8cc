"""A full disk, at any point: one line with the file name, exit code 1, and no partial results."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from runs import FULL, TEXT, flags, options, rows, told

from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.errors import WriteError
from gpt2.files.writing import writing
from gpt2.train import metrics
from gpt2.train.start import resume, train

pytestmark = pytest.mark.usefixtures("without_the_interpreter")


@contextlib.contextmanager
def no_file_beyond(size: int):
    """A context in which a write beyond `size` bytes of a file fails, as on a full disk, also for
    root. Python ignores the accompanying signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return "text.txt"


def strays(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp-" in path.name]


LIMITS = {
    "checkpoint": (8000, {}, "run/checkpoint.safetensors"),
    "best": (8000, {"keep_best": True, "save_interval": 100}, "run/best/checkpoint.safetensors"),
    "config": (300, {}, "run/config.json"),
    "tokenizer": (20, {}, "run/tokenizer.json"),
}


@pytest.mark.parametrize(("size", "chosen", "name"), LIMITS.values(), ids=LIMITS)
def test_while_a_run_saves(size, chosen, name, text, tmp_path, capsys):
    with no_file_beyond(size):
        assert main(["train", *flags(out="run", **chosen)]) == 1
    assert told(capsys) == f"gpt2: error: {name!r} cannot be written: File too large"
    assert not strays(tmp_path)


def test_an_old_checkpoint_survives_and_the_run_goes_on(text, tmp_path, capsys):
    assert main(["train", *flags(out="run")]) == 0
    before = (tmp_path / "run" / checkpoint.FILE).read_bytes()
    with no_file_beyond(8000):
        assert main(["train", "--resume", "run", "--steps", "8"]) == 1
    assert "run/checkpoint.safetensors' cannot be written: " in told(capsys)
    assert (tmp_path / "run" / checkpoint.FILE).read_bytes() == before
    assert main(["train", "--resume", "run", "--steps", "8"]) == 0
    assert [r["step"] for r in rows(tmp_path / "run")] == [2, 4, 5, 6, 8]


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux")
def test_while_a_line_of_the_metrics_is_written(text, tmp_path, capsys, monkeypatch):
    begin = metrics.Progress.__init__

    def on_a_full_disk(progress, *args, **options):
        begin(progress, *args, **options)
        progress._file.close()
        progress._file = FULL.open("a", buffering=1)

    monkeypatch.setattr(metrics.Progress, "__init__", on_a_full_disk)
    assert main(["train", *flags(out="run")]) == 1
    line = "gpt2: error: 'run/metrics.jsonl' cannot be written: No space left on device"
    assert told(capsys) == line


def test_the_folders_of_a_write_that_cannot_be_made(text, tmp_path, capsys, monkeypatch):
    """No space for a folder's name, or for a file when it is flushed."""
    for name in ("mkdir", "fsync"):
        with monkeypatch.context() as patch:

            def full(*args, **kwargs):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            (tmp_path / name).mkdir()
            patch.setattr(os, name, full)
            with pytest.raises(WriteError, match=f"'{name}/x' cannot be written: No space left"):
                from gpt2 import files

                files.write_atomic(f"{name}/x", "text")
        assert not list((tmp_path / name).iterdir())


# ---- the plot


@pytest.mark.parametrize("how", ["no-room", "error", "missing"])
def test_a_plot_that_cannot_be_drawn_never_ends_training(how, text, tmp_path, capsys, monkeypatch):
    if how == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        from matplotlib.figure import Figure

        def fail(*args, **kwargs):
            raise (
                OSError(errno.ENOSPC, "No space left") if how == "no-room" else ValueError("of its")
            )

        monkeypatch.setattr(Figure, "savefig", fail)
    assert train(options(text, out="run", sample_tokens=0)) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "loss.png" in line]
    assert line.rpartition("\r")[2].startswith("'run/loss.png' cannot be drawn, training contin")
    assert checkpoint.read(tmp_path / "run" / checkpoint.FILE)[1]["step"] == 12
    assert not (tmp_path / "run" / "loss.png").exists() and not strays(tmp_path)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert resume("run", steps=13) == 0 and (tmp_path / "run" / "loss.png").exists()


# ---- the other commands


CONVERTED = {
    "hf": "out/model.safetensors",
    "run": "out/checkpoint.safetensors",
    "nanogpt": "out",
    "llmc": "out",
}


@pytest.mark.parametrize("to", CONVERTED)
def test_while_a_model_is_converted(to, text, tmp_path, capsys):
    train(options(text, out="run", steps=1, sample_tokens=0))
    capsys.readouterr()
    with no_file_beyond(8000):
        assert main(["convert", "run", "out", "--to", to]) == 1
    line = told(capsys)
    assert line.startswith(f"gpt2: error: {CONVERTED[to]!r} cannot be written: "), line
    assert not strays(tmp_path) and not (tmp_path / CONVERTED[to]).exists()


@pytest.mark.parametrize("size", [1000, 3500])
def test_while_shards_are_written(size, text, tmp_path, capsys):
    """The ids are written first, to a file of their own, and then the shards."""
    train_tokens = "1000"
    with no_file_beyond(size):
        code = main(["prepare", text, "--out", "shards", "--tokenizer", "byte",
                     "--shard-tokens", train_tokens])  # fmt: skip
    assert code == 1 and "gpt2: error: 'shards" in told(capsys)
    assert not (tmp_path / "shards").exists() and not strays(tmp_path)


def test_while_a_tokenizer_is_written(text, tmp_path, capsys):
    with no_file_beyond(100):
        assert main(["tokenizer", text, "--vocab-size", "300", "--out", "bpe.json"]) == 1
    assert told(capsys) == "gpt2: error: 'bpe.json' cannot be written: File too large"
    assert not (tmp_path / "bpe.json").exists() and not strays(tmp_path)


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux")
def test_a_sample_on_a_full_disk(text, tmp_path, capsys, monkeypatch):
    """Samples go to standard output, also at the end of a run."""
    train(options(text, out="run", steps=1, sample_tokens=0))
    capsys.readouterr()
    for command in (
        ["sample", "run", "--max-new-tokens", "3"],
        ["train", "--resume", "run", "--steps", "2", "--sample-tokens", "3"],
        ["eval", "run", "--data", text],
    ):
        with FULL.open("w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(command) == 1
        line = "gpt2: error: standard output cannot be written: No space left on device"
        assert told(capsys) == line
    assert checkpoint.read(tmp_path / "run" / checkpoint.FILE)[1]["step"] == 2


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux")
def test_a_program_ends_in_one_line():
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpt2", "--version"], stdout=full, stderr=subprocess.PIPE,
            text=True, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 1
    line = "gpt2: error: standard output cannot be written: No space left on device\n"
    assert done.stderr == line


def test_only_a_disk_is_blamed():
    """Other errors, caused by users or by bugs, are not reported as a full disk."""
    for error in (PermissionError(errno.EACCES, "denied"), RuntimeError("a bug")):
        with pytest.raises(type(error)), writing("x"):
            raise error
    told = "'x' cannot be written: 9 requested and 3 written"
    with pytest.raises(WriteError, match=told), writing("x"):
        raise OSError("9 requested and 3 written")  # as NumPy's tofile raises
