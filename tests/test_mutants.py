"""The suite still notices each of the bugs in mutants.py, planted one at a time in a copy of the
package.

Always in the interpreter: a GPU would not notice most stray accesses. Every copy gets a process of
its own, forked from one that has imported torch already, which is most of what a small test costs.
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parents[1]
INTERPRETER = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}

# Errors of a mutant that does not run at all: no test can be credited with those.
BROKEN = ("SyntaxError", "NameError", "AttributeError", "TypeError", "CompilationError")


@pytest.fixture
def copy(tmp_path):
    """The package and its tests; gpt2/kernels is a link within the copy."""
    for folder in ("kernels", "gpt2", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    return tmp_path


def run_tests(copy, tests, monkeypatch):
    """pytest's exit status and output for these tests of the copy."""
    for name, value in INTERPRETER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GPT2_EXPECT", raising=False)  # how many cases the whole suite should run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "triton"])
    log = copy / "log"
    process = context.Process(target=_run_pytest, args=(copy, sorted(tests), log))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def _run_pytest(copy, tests, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(copy / "tests")
    # the copy, not what is installed, perhaps in editable mode
    original = (str(ROOT), str(ROOT / "tests"))
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in original)]
    status = pytest.main(["-q", "-x", "--tb=line", "--rootdir", str(copy), *tests])
    for name in ("gpt2", "gpt2.kernels.ops", "gpt2.kernels.triton", "util", "interpreter"):
        assert Path(sys.modules[name].__file__).is_relative_to(copy), sys.modules[name]
    sys.exit(int(status))


@pytest.mark.parametrize(
    "mutants",
    [
        pytest.param([m for m in MUTANTS if m.quick], id="quick"),
        pytest.param(MUTANTS, id="all", marks=pytest.mark.full),
    ],
)
def test_without_a_bug_all_pass(mutants, copy, monkeypatch):
    status, log = run_tests(copy, {m.killed_by for m in mutants}, monkeypatch)
    assert status == 0, log
    assert "skipped" not in log.lower(), log


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=[] if m.quick else pytest.mark.full) for m in MUTANTS],
)
def test_killed(mutant, copy, monkeypatch):
    file = copy / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} does not hold this once:\n{mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch)
    assert status != 0, f"survived {mutant.killed_by}"
    assert status == 1 and "Traceback" not in log, log  # 1: a test failed; else none could run
    assert not any(error in log for error in BROKEN), log
