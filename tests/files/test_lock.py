"""Two processes never write one run: the second is refused in one line, and a dead process holds no
lock."""

import errno
import os
import shutil
import signal
import time

import pytest
from runs import TEXT, options, rows

from gpt2 import files
from gpt2.checkpoints import checkpoint
from gpt2.cli import main
from gpt2.errors import InputError
from gpt2.files import lock
from gpt2.train import best
from gpt2.train.start import resume, train
from gpt2.train.trainer import Trainer

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="needs Linux or macOS")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def in_step(monkeypatch, step, act):
    """Calls act() in the middle of that step, while its process has the lock."""
    original, done = Trainer.train_step, []

    def train_step(trainer):
        if trainer.step == step and not done:
            done.append(step)
            act()
        return original(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return done


def test_a_second_resume_is_refused(text, tmp_path, monkeypatch, capsys):
    """Two of them took turns in writing one checkpoint, and lost steps without an error."""
    folder = tmp_path / "run"
    train(options(text, out=str(folder), sample_tokens=0))

    def second():
        before = contents(folder)
        capsys.readouterr()
        assert main(["train", "--resume", str(folder), "--steps", "30"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"gpt2: error: resume must be a folder that no other process trains in, got "
            f"{str(folder)!r}, which process {os.getpid()} on {lock.socket.gethostname()} has"
        )
        with pytest.raises(InputError, match="out must be a new or empty folder"):
            train(options(text, out=str(folder)))
        assert main(["sample", str(folder), "--max-new-tokens", "2"]) == 0, "reading is free"
        assert contents(folder) == before

    done = in_step(monkeypatch, 13, second)
    assert resume(folder, steps=14) == 0 and done
    assert not (folder / lock.FILE).exists()
    assert resume(folder, steps=15) == 0


def test_a_second_resume_sweeps_nothing(text, tmp_path, monkeypatch, capsys):
    """A file that looks like a dead writer's may be one that the first process is about to
    rename."""
    folder = tmp_path / "run"
    train(options(text, out=str(folder), sample_tokens=0, keep_best=True))
    (folder / f".{checkpoint.FILE}.tmp-dead").mkdir()
    places = [folder / checkpoint.FILE, folder / "best" / checkpoint.FILE]
    kept = []

    def second():
        assert not list(folder.glob(".*dead")), "the first has swept, under its lock"
        with files.work_folder(places[0]) as work, files.work_folder(places[1]) as of_best:
            (work / "half").write_text("written")
            before = contents(folder)
            assert main(["train", "--resume", str(folder), "--steps", "30"]) == 2
            assert contents(folder) == before and of_best.is_dir()
            kept.append((work / "half").read_text())

    done = in_step(monkeypatch, 13, second)
    assert resume(folder, steps=14) == 0 and done and kept == ["written"]


def test_a_resume_that_comes_while_the_first_loads_is_refused(text, tmp_path, monkeypatch):
    """Both have read step 12; the first continues, and ends before the second gets the lock."""
    folder = tmp_path / "run"
    train(options(text, out=str(folder), sample_tokens=0))
    load, first = Trainer.load, []

    def slow_load(trainer, *args):
        load(trainer, *args)
        if not first:
            first.append(True)
            assert resume(folder, steps=13) == 0

    monkeypatch.setattr(Trainer, "load", slow_load)
    with pytest.raises(InputError, match=r"resume must be .* whose checkpoint has just been repl"):
        resume(folder, steps=20)
    assert checkpoint.read(folder / checkpoint.FILE)[1]["step"] == 13
    assert rows(folder)[-1]["step"] == 13


@pytest.mark.parametrize("still", [True, False], ids=["runs", "has-finished"])
def test_two_new_runs_into_one_folder(still, text, tmp_path, monkeypatch):
    """Both found the folder new; the second must not write to the run that the first has begun."""
    folder, build, seen = tmp_path / "run", Trainer.__init__, {}

    def slow_build(trainer, *args):
        build(trainer, *args)
        monkeypatch.setattr(Trainer, "__init__", build)
        if still:
            folder.mkdir()
            seen["lock"] = lock.held("out", folder)
            seen["lock"].__enter__()
            (folder / "config.json").write_text("the first's")
        else:
            train(options(text, out=str(folder), sample_tokens=0))
        seen["files"] = contents(folder)

    monkeypatch.setattr(Trainer, "__init__", slow_build)
    message = "no other process trains in" if still else "out must be a new or empty folder"
    with pytest.raises(InputError, match=message):
        train(options(text, out=str(folder)))
    assert contents(folder) == seen["files"]
    if still:
        seen["lock"].__exit__(None, None, None)


def test_the_lock_ends_with_its_process(tmp_path):
    """The process is killed; the lock file stays, but locks nothing."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with lock.held("out", tmp_path):
                os.write(told, b".")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(ready, 1)
    for refuses in (lock.check_free, lambda *args: lock.held(*args).__enter__()):
        with pytest.raises(InputError, match=f"which process {child} on "):
            refuses("out", tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / lock.FILE).exists()
    files.check_new_folder("out", tmp_path)
    lock.check_free("out", tmp_path)
    with lock.held("out", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """The file was opened while the first process held it, and locked after it was removed. A third
    process may have created a new file meanwhile."""
    flock, tries = lock.fcntl.flock, []

    def late(handle, how):
        if not tries:
            (tmp_path / lock.FILE).unlink()
        tries.append(how)
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.held("out", tmp_path):
        assert len(tries) == 2
        with pytest.raises(InputError, match="out must be a folder that no other process"):
            lock.held("out", tmp_path).__enter__()


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    for _ in range(2):
        lock.check_free("out", tmp_path)
        with lock.held("out", tmp_path):
            lock.check_free("out", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpt2: {str(tmp_path)!r} cannot be locked (No locks available): ")


def test_a_system_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    lock.check_free("out", tmp_path)
    with lock.held("out", tmp_path), lock.held("out", tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock.os, "open", denied)
    with pytest.raises(InputError, match=r"resume must be a folder that can be written, got .*run"):
        lock.held("resume", tmp_path / "run").__enter__()


@pytest.mark.parametrize("command", [[], ["--resume", "run"]], ids=["new", "resume"])
def test_torchrun_is_refused(command, text, tmp_path, monkeypatch, capsys):
    """Each of its processes trained the whole run, in the same folder."""
    monkeypatch.chdir(tmp_path)
    train(options(text, out="run", sample_tokens=0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    before = {path: contents(path) for path in [tmp_path / "run"]}
    flags = command or ["--data", text, "--out", "new"]
    assert main(["train", *flags, "--steps", "14"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "gpt2: error: WORLD_SIZE must be 1 or absent, training runs in one process (start it "
        "without torchrun), got 2"
    )
    assert {path: contents(path) for path in before} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    shutil.rmtree(tmp_path / "run")
    assert train(options(text, out="run", sample_tokens=0)) == 0


@pytest.mark.parametrize("kind", ["link", "dangling", "hard-link", "pipe"])
def test_a_lock_that_is_no_file_of_the_folder(kind, tmp_path):
    """A link was followed, and its target was emptied."""
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    path = folder / lock.FILE
    if kind != "dangling":
        other.write_text("the user's")
    if kind == "hard-link":
        os.link(other, path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    for refuses in (lock.check_free, lambda *args: lock.held(*args).__enter__()):
        with pytest.raises(InputError, match=r"^out must be a folder with a \.lock of its own"):
            refuses("out", folder)
    assert os.path.lexists(path)
    assert other.read_text() == "the user's" if kind != "dangling" else not other.exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_best_that_is_no_folder_of_the_run(kind, text, tmp_path, capsys):
    """A link was followed: a resume replaced another run's checkpoint."""
    folder, other = tmp_path / "run", tmp_path / "other"
    train(options(text, out=str(folder), steps=2, sample_tokens=0))
    shutil.copytree(folder, other)
    if kind == "link":
        (folder / "best").symlink_to("../other")
    else:
        (folder / "best").write_text("the user's")
    before = contents(folder), contents(other)
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--keep-best", "--steps", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    wanted = f"gpt2: error: keep_best needs {str(folder / 'best')!r} to be a folder or absent, got "
    assert line.startswith(wanted)
    with pytest.raises(InputError, match="keep_best needs"):
        best.write(folder, None, None, step=1, val_loss=1.0, measure=None)
    assert (contents(folder), contents(other)) == before
    assert resume(folder, steps=3) == 0, "without keep_best nothing is written there"


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_folder_that_goes_while_its_run_trains(how, text, tmp_path, monkeypatch, capsys):
    """The folder was created again with only a checkpoint, and the exit code was 0."""
    monkeypatch.chdir(tmp_path)
    train(options(text, out="run", steps=2, sample_tokens=0))
    shutil.copytree("run", "copy")

    def go():
        if how == "removed":
            shutil.rmtree("run")
        else:
            os.rename("run", "run2")
        if how == "replaced":
            os.rename("copy", "run")
            (tmp_path / "run" / lock.FILE).write_text("another's")

    in_step(monkeypatch, 3, go)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--steps", "6"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    told = "gpt2: error: 'run' cannot be written: it was moved or removed while the run trained"
    assert line == told
    if how == "replaced":
        kept = contents(tmp_path / "run")
        assert kept.pop(lock.FILE) == b"another's" and kept
        assert checkpoint.read(tmp_path / "run" / checkpoint.FILE)[1]["step"] == 2
    else:
        assert not (tmp_path / "run").exists()
    if how == "moved":
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert resume("run2", steps=6) == 0
