"""The suite still notices each of the bugs in mutants.py, and in csrc those of mutants_rows.py,
mutants_attention.py and mutants_gemv.py, planted one at a time in a copy of the package.

Always in the interpreter: a GPU would not notice most stray accesses. Every copy gets a process of
its own, forked from one that has imported torch already, which is most of what a small test costs.
Of csrc a copy compiles what its test runs, less optimised.
"""

import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS
from mutants_attention import ATTENTION_MUTANTS
from mutants_gemv import BLOCK_MUTANTS, GEMV_MUTANTS
from mutants_rows import ROW_MUTANTS

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


def run_tests(copy, tests, monkeypatch, prepare=None):
    """pytest's exit status and output for these tests of the copy; prepare, called before they are
    imported, loads its native library."""
    for name, value in INTERPRETER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GPT2_EXPECT", raising=False)  # how many cases the whole suite should run
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
    # the copy, not what is installed, perhaps in editable mode
    original = (str(ROOT), str(ROOT / "tests"))
    ours = [str(copy), str(copy / "tests")]
    sys.path[:] = [*ours, *(path for path in sys.path if path not in original)]
    if prepare is not None:
        prepare()
    status = pytest.main(["-q", "-x", "--full", "--tb=line", "--rootdir", str(copy), *tests])
    for name in ("gpt2", "gpt2.kernels.ops", "gpt2.kernels.triton", "util", "interpreter"):
        assert Path(sys.modules[name].__file__).is_relative_to(copy), sys.modules[name]
    sys.exit(int(status))


def load_cpu_kernels(library):
    from gpt2.kernels import native

    torch.ops.load_library(library)
    native._reasons["cpu"] = None  # loaded


@pytest.fixture(scope="session")
def as_built():
    """Prepares a copy's process: its native library is this one's, where there is any."""
    from conftest import why_no_cpu_kernels  # not above: a child imports the copy's

    from gpt2.kernels import native

    library = None
    if why_no_cpu_kernels("") is None:
        name = native._file_name("cpu")
        library = next(path for path in torch.ops.loaded_libraries if Path(path).name == name)
    return functools.partial(load_as_built, library)


def load_as_built(library):
    import util  # noqa: F401  what run_tests looks for: not every test imports it

    if library is not None:
        load_cpu_kernels(library)


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


def cases(mutants):
    """A test each; the quick ones run by default."""
    return [pytest.param(m, id=m.name, marks=[] if m.quick else pytest.mark.full) for m in mutants]


@pytest.mark.triton
@pytest.mark.parametrize("mutant", cases(MUTANTS))
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

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()


# The entries of table.h that a part's tests need: others are null, most of the time that compiling
# takes.
PARTS = {
    "rows": "gelu|bias_gelu|layer_norm|cross_entropy",
    "attention": "attention",
    "gemv": "gemv",
    "blocks": "gemv|attention_fwd|attention_decode|layer_norm_fwd|gelu_fwd|bias_gelu_fwd",
}
OPERATORS = ("cpu/library.cpp", "ops.cpp", "ops_attention.cpp", "cpu/ops_gemv.cpp",
             "cpu/ops_decode.cpp")  # fmt: skip
AS_OPERATOR = ("-O0",) if HAS_AVX512 else ("-O0", "-DGPT2_KERNELS_EMULATED")


def compile_kernels(csrc, part, isa, *dtypes):
    """The object files, by source, of one part, of one instruction set and for these dtypes."""
    from gpt2.kernels import _build  # not above: a child imports the copy's

    table = csrc / "cpu/table.h"
    text = re.sub(rf"\.(?!{PARTS[part]})(\w+) = [^\n]*,", r".\1 = nullptr,", table.read_text())
    table.write_text(text)
    stub = "const Kernels& kernels_{}() {{ static constexpr Kernels none = {{}}; return none; }}\n"
    lines = "".join(stub.format(name) for name in ISAS if name != isa)
    (csrc / "none.cpp").write_text(f'#include "cpu/kernels.h"\nnamespace gpt2 {{\n{lines}}}\n')
    source = f"cpu/kernels_{isa}.cpp"
    keep = "|".join(dtypes)
    text = re.sub(rf"&ops<[\w<>]+, (?!{keep})\w+>", "nullptr", (csrc / source).read_text())
    (csrc / source).write_text(text)

    emulated = not HAS_AVX512 and isa.startswith("avx512")
    compiler = [str(ROOT / "tests/avx512/c++")] if emulated else _build.find_compiler()
    jobs = {"none.cpp": ("-O0",), source: ("-O1", *_build._SOURCES[source])}
    return compile_all(csrc, compiler, jobs)


def compile_operators(csrc, sources):
    from gpt2.kernels import _build

    return compile_all(csrc, _build.find_compiler(), dict.fromkeys(sources, AS_OPERATOR))


def compile_all(csrc, compiler, jobs):
    """The object files of these sources, each with its own flags."""
    from gpt2.kernels import _build

    include = Path(torch.__file__).parent / "include"
    for source, own in jobs.items():
        command = [*compiler, *_build._COMPILE, "-w", "-isystem", include, *own]
        output = ["-c", source, "-o", f"{Path(source).stem}.o"]
        subprocess.run([*command, *output], cwd=csrc, check=True)
    return {source: csrc / f"{Path(source).stem}.o" for source in jobs}


def link(csrc, objects):
    from gpt2.kernels import _build

    torch_cpu = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    command = ["-shared", *map(str, objects), *torch_cpu, "-o", "part.so"]
    subprocess.run([_build.find_compiler()[0], *command], cwd=csrc, check=True)
    return csrc / "part.so"


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The operators as they are, compiled: most mutants share them."""
    csrc = tmp_path_factory.mktemp("operators") / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    return compile_operators(csrc, OPERATORS)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """compile_kernels of csrc as it is: the mutants of operators share them."""

    @functools.cache
    def compiled(*args):
        csrc = tmp_path_factory.mktemp("kernels") / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        return compile_kernels(csrc, *args)

    return compiled


CSRC_MUTANTS = [
    pytest.param(part, mutant, id=mutant.name)
    for part, mutants in {
        "rows": ROW_MUTANTS,
        "attention": ATTENTION_MUTANTS,
        "gemv": GEMV_MUTANTS,
        "blocks": BLOCK_MUTANTS,
    }.items()
    for mutant in mutants
]
NAMES = {"fp32": "float", "bf16": "bf16", "fp16": "f16"}  # as csrc has them


@pytest.mark.full
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("part, mutant", CSRC_MUTANTS)
def test_killed_in_csrc(part, mutant, copy, operators, kernels, monkeypatch):
    """That its test passes without it is seen where the test itself runs."""
    plant(mutant, copy)
    csrc, source = copy / "csrc", mutant.file.removeprefix("csrc/")
    isa = re.search(r"\[cpu-(\w+?)[-\]]", mutant.killed_by)[1]
    dtypes = [name for id, name in NAMES.items() if id in mutant.killed_by] or ["float"]
    if source in OPERATORS:
        changed = compile_operators(csrc, [source]) | kernels(part, isa, *dtypes)
    else:
        changed = compile_kernels(csrc, part, isa, *dtypes)
    library = link(csrc, (operators | changed).values())
    load = functools.partial(load_cpu_kernels, library)
    status, log = run_tests(copy, {mutant.killed_by}, monkeypatch, load)
    assert_killed(mutant, status, log)
