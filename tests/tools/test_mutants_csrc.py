"""The suite must notice bugs of csrc/cpu, planted one at a time (planting.py).

A copy compiles only the code that its test runs, with less optimization: one instruction set, one
dtype, some kernels.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from mutants.csrc_attention import ATTENTION_MUTANTS
from mutants.csrc_linear import BLOCK_MUTANTS, LINEAR_MUTANTS
from mutants.csrc_rows import ROW_MUTANTS
from planting import ROOT, assert_killed, built_once, load_cpu_kernels, plant, run_tests
from planting import copy as copy

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()


# The entries of fill_ops.h that a part's tests need; null entries save most of the compile time.
PARTS = {
    "rows": "gelu|bias_gelu|layer_norm|mixed_layer_norm|cross_entropy",
    "attention": "attention|decode_attention",
    "linear": "linear",
    "blocks": "linear|attention_fwd|decode_attention|layer_norm_fwd|gelu_fwd|bias_gelu_fwd",
}
OPERATORS = ("cpu/library.cpp", "ops/attention.cpp", "ops/cross_entropy.cpp",
             "ops/decode_attention.cpp", "ops/decode_layers.cpp", "ops/gelu.cpp",
             "ops/layer_norm.cpp", "ops/linear.cpp")  # fmt: skip
AS_OPERATOR = ("-O0",) if HAS_AVX512 else ("-O0", "-DGPT2_KERNELS_EMULATED")


def compile_kernels(csrc, part, isa, *dtypes):
    """Returns the object files by source for one part, one instruction set and these dtypes."""
    from gpt2.kernels.native import compiler, recipes  # late: a child imports the copy's

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
    cxx = [str(ROOT / "tests/tools/avx512/c++")] if emulated else compiler.find_compiler()
    jobs = {"none.cpp": ("-O0",), source: ("-O1", *recipes.SOURCES[source])}
    return compile_all(csrc, cxx, jobs)


def compile_operators(csrc, sources):
    from gpt2.kernels.native import compiler

    return compile_all(csrc, compiler.find_compiler(), dict.fromkeys(sources, AS_OPERATOR))


def compile_all(csrc, cxx, jobs):
    """The object files of these sources, each compiled with its own flags."""
    from gpt2.kernels.native import recipes

    include = Path(torch.__file__).parent / "include"
    for source, own in jobs.items():
        command = [*cxx, *recipes.COMPILE, *recipes.STABLE, "-w", "-isystem", include, *own]
        output = ["-c", source, "-o", f"{Path(source).stem}.o"]
        subprocess.run([*command, *output], cwd=csrc, check=True)
    return {source: csrc / f"{Path(source).stem}.o" for source in jobs}


def link(csrc, objects):
    from gpt2.kernels.native import compiler

    torch_cpu = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    command = ["-shared", *map(str, objects), *torch_cpu, "-o", "part.so"]
    subprocess.run([compiler.find_compiler()[0], *command], cwd=csrc, check=True)
    return csrc / "part.so"


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The unchanged operators, compiled once: most mutants share them."""

    def build(folder):
        csrc = shutil.copytree(ROOT / "csrc", folder / "csrc")
        compile_operators(csrc, OPERATORS)

    csrc = built_once(tmp_path_factory, "operators", build) / "csrc"
    return {source: csrc / f"{Path(source).stem}.o" for source in OPERATORS}


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
NAMES = {"fp32": "float", "bf16": "bf16", "fp16": "f16"}  # names in csrc


@pytest.mark.full
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("part, mutant", CSRC_MUTANTS)
def test_killed_in_csrc(part, mutant, copy, operators, monkeypatch):
    """The test itself, in its own run, shows that it passes without the bug."""
    plant(mutant, copy)
    csrc, source = copy / "csrc", mutant.file.removeprefix("csrc/")
    isa = re.search(r"\[cpu-(\w+?)[-\]]", mutant.killed_by)[1]
    dtypes = [name for id, name in NAMES.items() if id in mutant.killed_by] or ["float"]
    changed = compile_kernels(csrc, part, isa, *dtypes)
    if source in OPERATORS:
        changed |= compile_operators(csrc, [source])
    elif source.startswith("ops/"):  # a header
        changed |= compile_operators(csrc, OPERATORS)
    library = link(csrc, (operators | changed).values())
    load = functools.partial(load_cpu_kernels, library)
    assert_killed(mutant, *run_tests(copy, {mutant.killed_by}, monkeypatch, load))
