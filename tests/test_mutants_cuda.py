"""The suite still notices bugs of csrc/cuda, planted one at a time (planting.py).

All of csrc/cuda is compiled once; of a copy, what the bug is in, for the head size and the dropout
that its test asks for. With --full one in eight is planted; all of them by naming the test, as in
test_mutants_csrc.py.
"""

import functools
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import cuda_backend
import pytest
from mutants.csrc_cuda import CUDA_MUTANTS
from planting import assert_killed, copy, plant, run_tests  # noqa: F401

LIBRARY = "libgpt2_kernels_cuda.so"

# Which sources a header's bugs are planted for.
INCLUDED_BY = {
    "mma.cuh": ("cuda/attention.cu", "cuda/attention_bwd.cu"),
    "attention.cuh": ("cuda/attention.cu", "cuda/attention_bwd.cu"),
    "layer_norm.cuh": ("cuda/layer_norm.cu", "cuda/layer_norm_bwd.cu"),
    "reduce.cuh": ("cuda/layer_norm.cu", "cuda/layer_norm_bwd.cu"),
    "partial.cuh": ("cuda/layer_norm_bwd.cu",),
    "heads.h": ("ops/attention.cpp", "ops/decode_attention.cpp"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with what compiling csrc/cuda as it is leaves, and the commands that did it."""
    from emulated_library import emulated
    from emulator import cuda_device

    from gpt2.kernels import _build

    work = tmp_path_factory.mktemp("built")
    library = emulated(cuda_device.build().resolve())
    keeping = replace(library, nvcc=(*library.nvcc, "-keep", f"-keep-dir={work}"))
    _build.run(keeping, _build.find_tools(library), work, work / LIBRARY)
    return work


def compile_copy(csrc, work, built, sources):
    """A copy's library in the folder work: these sources compiled, of the others what is built."""
    objects = [f"{source.replace('/', '-')}.o" for source in sources]
    compiled_anew = {*objects, *(f"{Path(source).stem}.ptx" for source in sources)}
    work.mkdir()
    for path in (*built.glob("*.o"), *built.glob("*.ptx")):
        if path.name not in compiled_anew:
            os.link(path, work / path.name)
    ninja = (built / "build.ninja").read_text().replace(str(built), str(work))
    steps = dict(re.findall(r"^build (\S+): run.*\n  run = (.*)$", ninja, re.M))
    for name in (*objects, LIBRARY):
        command = steps[str(work / name)].replace("$$", "$")
        subprocess.run(f"{command} -w", shell=True, cwd=csrc, check=True)


def load_copy(work):
    import cuda_backend

    cuda_backend.load(work / LIBRARY, sorted(work.glob("*.ptx")))


def narrow(csrc, test):
    """Leaves the kernels of the test's head size, with or without dropout."""
    common = csrc / "cuda/attention.cuh"
    text = common.read_text()
    D = int((re.search(r"-D(\d+)-", test) or (0, 64))[1])
    padded = next(size for size in (32, 64, 96, 128) if size >= D)
    text, sizes = re.subn(
        r"  if \(D <= (\d+)\) return f\(std::integral_constant<int, \1>\(\)\);\n", "", text
    )
    text, last = re.subn(
        r"return f\(std::integral_constant<int, 128>\(\)\);",
        f"return f(std::integral_constant<int, {padded}>());", text,
    )  # fmt: skip
    drops = "true" if "drop" in test.partition("[")[2] else "false"
    text, masks = re.subn(
        r"  if \(x.dropout_p > 0\) return .*\n  return f\(std::false_type\(\)\);",
        f"  return f(std::{drops}_type());",
        text,
    )
    assert (sizes, last, masks) == (3, 1, 1)
    common.write_text(text)


@pytest.mark.full
@pytest.mark.grid(full=8)
@pytest.mark.cuda_kernels
@pytest.mark.skipif(cuda_backend.ON_GPU, reason="on a GPU nothing is emulated")
@pytest.mark.parametrize("mutant", CUDA_MUTANTS, ids=lambda mutant: mutant.name)
def test_killed_in_csrc_cuda(mutant, copy, built, monkeypatch):  # noqa: F811
    """That its test passes without it is seen where the test itself runs."""
    plant(mutant, copy)
    narrow(copy / "csrc", mutant.killed_by)
    own = (mutant.file.removeprefix("csrc/"),)
    sources = INCLUDED_BY.get(Path(mutant.file).name, own)
    compile_copy(copy / "csrc", copy / "work", built, sources)
    load = functools.partial(load_copy, copy / "work")
    assert_killed(mutant, *run_tests(copy, {mutant.killed_by}, monkeypatch, load))
