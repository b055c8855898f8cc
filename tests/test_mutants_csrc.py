"""The suite still notices bugs of csrc/cpu, planted one at a time (planting.py).

A copy compiles what its test runs, less optimised: one instruction set, one dtype, some kernels.
With --full one in eight is planted; all of them by naming the test:

    pytest tests/test_mutants_csrc.py::test_killed_in_csrc --full
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mutants.csrc_attention import ATTENTION_MUTANTS
from mutants.csrc_gemv import BLOCK_MUTANTS, LINEAR_MUTANTS
from mutants.csrc_rows import ROW_MUTANTS
from planting import ROOT, assert_killed, copy, load_cpu_kernels, plant, run_tests  # noqa: F401

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()


# The entries of fill_ops.h that a part's tests need; the others are null, which saves most of the
# time that compiling takes.
PARTS = {
    "rows": "gelu|bias_gelu|layer_norm|cross_entropy",
    "attention": "attention|decode_attention",
    "linear": "linear",
    "blocks": "linear|attention_fwd|decode_attention|layer_norm_fwd|gelu_fwd|bias_gelu_fwd",
}
OPERATORS = ("cpu/library.cpp", "ops/attention.cpp", "ops/cross_entropy.cpp",
             "ops/decode_attention.cpp", "ops/decode_layers.cpp", "ops/gelu.cpp",
             "ops/layer_norm.cpp", "ops/linear.cpp")  # fmt: skip
AS_OPERATOR = ("-O0",) if HAS_AVX512 else ("-O0", "-DGPT2_KERNELS_EMULATED")


def compile_kernels(csrc, part, isa, *dtypes):
    """The object files, by source, of one part, of one instruction set and for these dtypes."""
    from gpt2.kernels import _build  # not above: a child imports the copy's

    table = csrc / "cpu/fill_ops.h"
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
        "linear": LINEAR_MUTANTS,
        "blocks": BLOCK_MUTANTS,
    }.items()
    for mutant in mutants
]
NAMES = {"fp32": "float", "bf16": "bf16", "fp16": "f16"}  # as csrc has them


@pytest.mark.full
@pytest.mark.grid(full=8)
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("part, mutant", CSRC_MUTANTS)
def test_killed_in_csrc(part, mutant, copy, operators, kernels, monkeypatch):  # noqa: F811
    """That its test passes without it is seen where the test itself runs."""
    plant(mutant, copy)
    csrc, source = copy / "csrc", mutant.file.removeprefix("csrc/")
    isa = re.search(r"\[cpu-(\w+?)[-\]]", mutant.killed_by)[1]
    dtypes = [name for id, name in NAMES.items() if id in mutant.killed_by] or ["float"]
    if source in OPERATORS or source.startswith("ops/"):
        including = [source] if source in OPERATORS else OPERATORS
        changed = compile_operators(csrc, including) | kernels(part, isa, *dtypes)
    else:
        changed = compile_kernels(csrc, part, isa, *dtypes)
    library = link(csrc, (operators | changed).values())
    load = functools.partial(load_cpu_kernels, library)
    assert_killed(mutant, *run_tests(copy, {mutant.killed_by}, monkeypatch, load))
