"""The suite still notices each of the bugs in mutants.py, planted one at a time in a copy of the
package.

Always in the interpreter: a GPU would not notice most stray accesses. Every copy gets a process of
its own, forked from one that has imported torch already, which is most of what a small test costs.
Of csrc a copy compiles what its test runs: the row kernels of one instruction set, less optimised.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutants import CPU_MUTANTS, MUTANTS

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
    for folder in ("kernels", "gpt2", "tests", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    return tmp_path


def run_tests(copy, tests, monkeypatch, library=None):
    """pytest's exit status and output for these tests of the copy, with its native library."""
    for name, value in INTERPRETER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GPT2_EXPECT", raising=False)  # how many cases the whole suite should run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "triton"])
    log = copy / "log"
    process = context.Process(target=_run_pytest, args=(copy, sorted(tests), log, library))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def _run_pytest(copy, tests, log, library):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(copy / "tests")
    # the copy, not what is installed, perhaps in editable mode
    original = (str(ROOT), str(ROOT / "tests"))
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in original)]
    if library is not None:
        from gpt2.kernels import native

        torch.ops.load_library(library)
        native._reasons["cpu"] = None  # loaded
    status = pytest.main(["-q", "-x", "--tb=line", "--rootdir", str(copy), *tests])
    for name in ("gpt2", "gpt2.kernels.ops", "gpt2.kernels.triton", "util", "interpreter"):
        assert Path(sys.modules[name].__file__).is_relative_to(copy), sys.modules[name]
    sys.exit(int(status))


@pytest.mark.triton
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


@pytest.mark.triton
@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=[] if m.quick else pytest.mark.full) for m in MUTANTS],
)
def test_killed(mutant, copy, monkeypatch):
    plant(mutant, copy)
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch)
    assert_killed(mutant, status, log)


def plant(mutant, copy):
    file = copy / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} does not hold this once:\n{mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))


def assert_killed(mutant, status, log):
    assert status != 0, f"survived {mutant.killed_by}"
    assert status == 1 and "Traceback" not in log, log  # 1: a test failed; else none could run
    assert not any(error in log for error in BROKEN), log


# ---- bugs of csrc


def compile_rows(copy, isas, ops_object=None):
    """A library of the copy's row kernels for these instruction sets. Attention, most of the time
    that compiling takes, is left out of the tables, and other sets are tables of nothing."""
    from gpt2.kernels import _build  # not above: a child imports the copy's

    csrc = copy / "csrc"
    table = csrc / "cpu/table.h"
    text = re.sub(r'#include "attention.*\n', "", table.read_text())
    table.write_text(re.sub(r"(\.attention_\w+) = [^\n]*,", r"\1 = nullptr,", text))
    others = [isa for isa in ("avx512_bf16", "avx512", "avx2", "scalar") if isa not in isas]
    stub = "const Kernels& kernels_{}() {{ static constexpr Kernels none = {{}}; return none; }}\n"
    lines = "".join(map(stub.format, others))
    (csrc / "none.cpp").write_text(f'#include "cpu/kernels.h"\nnamespace gpt2 {{\n{lines}}}\n')

    root = Path(torch.__file__).parent
    compile = [*_build.find_compiler(), *_build._COMPILE, "-w", "-isystem", str(root / "include")]
    flags = {"avx2": ["-O1", *_build._AVX2], "scalar": ["-O1"]}
    jobs = {f"cpu/kernels_{isa}.cpp": flags[isa] for isa in isas} | {"none.cpp": ["-O0"]}
    objects = [f"{Path(source).stem}.o" for source in jobs]
    if ops_object is None:
        jobs["ops.cpp"] = ["-O0"]
    for source, own in jobs.items():
        command = [*compile, *own, "-c", source, "-o", f"{Path(source).stem}.o"]
        subprocess.run(command, cwd=csrc, check=True)
    link = [*objects, str(ops_object or "ops.o"), f"-L{root / 'lib'}", *_build._LINK]
    subprocess.run([compile[0], *link, "-o", "rows.so"], cwd=csrc, check=True)
    return csrc / "rows.so"


@pytest.mark.full
@pytest.mark.cpu_kernels
def test_without_a_bug_all_of_csrc_passes(copy, monkeypatch):
    library = compile_rows(copy, ["avx2", "scalar"])
    status, log = run_tests(copy, {m.killed_by for m in CPU_MUTANTS}, monkeypatch, library)
    assert status == 0, log
    assert "skipped" not in log.lower(), log


@pytest.fixture(scope="module")
def ops_object(tmp_path_factory):
    """ops.cpp of csrc as it is, which most mutants share."""
    copy = tmp_path_factory.mktemp("ops")
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    compile_rows(copy, [])
    return copy / "csrc/ops.o"


@pytest.mark.full
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name) for m in CPU_MUTANTS])
def test_killed_in_csrc(mutant, copy, ops_object, monkeypatch):
    plant(mutant, copy)
    isa = re.search(r"\[cpu-(\w+?)[-\]]", mutant.killed_by).group(1)
    library = compile_rows(copy, [isa], None if mutant.file.endswith("ops.cpp") else ops_object)
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch, library)
    assert_killed(mutant, status, log)
