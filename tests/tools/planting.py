"""Plants a bug in a copy of the package, and runs the copy's tests in another process.

They always run in the interpreter, because a GPU would not notice most stray accesses. The process
is a fork of one that has imported torch, since importing dominates the time of a small test.
"""

import fcntl
import functools
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}

# Errors of a mutant that does not run at all, which no test gets credit for.
BROKEN = ("SyntaxError", "NameError", "AttributeError", "TypeError", "CompilationError")


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and its tests; gpt2/kernels is a link within the copy."""
    for folder in ("kernels", "gpt2", "tests", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    return tmp_path


def built_once(tmp_path_factory, name, build):
    """The folder `name` of this run, filled by build(folder). The first pytest-xdist process that
    needs it builds; the others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # shared by all processes
    folder, complete = base / name, base / f"{name}.complete"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            folder.mkdir()
            build(folder)
            complete.touch()
    return folder


def run_tests(copy, tests, monkeypatch, prepare=None):
    """pytest's exit status and output for these tests of the copy. prepare() loads the copy's
    native library before the tests are imported."""
    for name, value in INTERPRETER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GPT2_EXPECT", raising=False)  # expected counts apply to the whole suite
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "triton"])
    log = copy / "log"
    process = context.Process(target=_run_pytest, args=(copy, sorted(tests), log, prepare))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def _run_pytest(copy, tests, log, prepare):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(copy / "tests")
    # Import the copy, not an installed package (which may be editable).
    original = (str(ROOT), str(ROOT / "tests" / "tools"))
    ours = [str(copy), str(copy / "tests" / "tools")]
    sys.path[:] = [*ours, *(path for path in sys.path if path not in original)]
    if prepare is not None:
        prepare()
    status = pytest.main(
        [
            "-q",
            "-x",
            "--full",
            "--tb=line",
            "--import-mode=importlib",
            "--rootdir",
            str(copy),
            *tests,
        ]
    )
    for name in ("gpt2", "gpt2.kernels.ops", "gpt2.kernels.triton", "util", "triton_interpreter"):
        assert Path(sys.modules[name].__file__).is_relative_to(copy), sys.modules[name]
    sys.exit(int(status))


def load_cuda_kernels(library):
    """Loads a copy's CUDA library, with the PTX next to it, on the emulator."""
    import cuda_backend

    cuda_backend.load(library, sorted(library.parent.glob("*.ptx")))


def load_cpu_kernels(library):
    from gpt2.kernels.native import libraries

    torch.ops.load_library(library)
    libraries._reasons["cpu"] = None  # loaded


@pytest.fixture(scope="session")
def as_built():
    """Prepares a copy's process: it uses this process's native library, if there is one."""
    from backends import why_no_cpu_kernels  # imported late: a child imports the copy's module

    from gpt2.kernels.native import libraries

    library = None
    if why_no_cpu_kernels("") is None:
        name = libraries._file_name("cpu")
        library = next(path for path in torch.ops.loaded_libraries if Path(path).name == name)
    return functools.partial(load_as_built, library)


def load_as_built(library):
    import util  # noqa: F401  checked by run_tests; not every test imports it

    if library is not None:
        load_cpu_kernels(library)


def cases(mutants):
    """One test per mutant; the quick ones run by default."""
    return [pytest.param(m, id=m.name, marks=[] if m.quick else pytest.mark.full) for m in mutants]


def plant(mutant, copy):
    file = copy / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} does not hold this once:\n{mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))


def assert_killed(mutant, status, log):
    assert status != 0, f"survived {mutant.killed_by}"
    assert status == 1 and "Traceback" not in log, log  # 1: a test failed; else none could run
    assert not any(error in log for error in BROKEN), log
