"""The suite must notice bugs of csrc/cuda, planted one at a time (planting.py).

Only the source with the bug is compiled, for its test's head size and dropout. Everything else
comes from the library that the other tests use.
"""

import functools
import re
import subprocess
from pathlib import Path

import cuda_backend
import pytest
from mutants.csrc_cuda import CUDA_MUTANTS
from planting import assert_killed, copy, load_cuda_kernels, plant, run_tests  # noqa: F401

LIBRARY = "libgpt2_kernels_cuda.so"

# Header -> sources that are compiled with its bugs.
INCLUDED_BY = {
    "mma.cuh": ("cuda/attention.cu", "cuda/attention_bwd.cu"),
    "attention.cuh": ("cuda/attention.cu", "cuda/attention_bwd.cu"),
    "layer_norm.cuh": ("cuda/layer_norm.cu", "cuda/layer_norm_bwd.cu"),
    "reduce.cuh": ("cuda/layer_norm.cu", "cuda/layer_norm_bwd.cu"),
    "partial.cuh": ("cuda/layer_norm_bwd.cu",),
    "heads.h": ("ops/attention.cpp", "ops/decode_attention.cpp"),
}


def compile_copy(csrc, work, sources):
    """Builds a copy's library in the folder work: compiles these sources and links the others as
    built."""
    built = cuda_backend.built()
    changed = {f"{source.replace('/', '-')}.o" for source in sources}
    changed |= {f"{Path(source).stem}.ptx" for source in sources if source.endswith(".cu")}
    work.mkdir()
    for path in (*built.glob("*.o"), *built.glob("*.ptx")):
        if path.name not in changed:
            (work / path.name).symlink_to(path)
    ninja = (built / "build.ninja").read_text().replace(str(built), str(work))
    steps = dict(re.findall(r"^build (\S+): run.*\n  run = (.*)$", ninja, re.M))
    for name in (*sorted(n for n in changed if n.endswith(".o")), LIBRARY):
        command = steps[str(work / name)].replace("$$", "$")
        subprocess.run(f"{command} -w", shell=True, cwd=csrc, check=True)


def narrow(csrc, test):
    """Keeps only the kernels of the test's head size, with or without dropout."""
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
@pytest.mark.cuda_kernels
@pytest.mark.skipif(cuda_backend.ON_GPU, reason="on a GPU nothing is emulated")
@pytest.mark.parametrize("mutant", CUDA_MUTANTS, ids=lambda mutant: mutant.name)
def test_killed_in_csrc_cuda(mutant, copy, monkeypatch):  # noqa: F811
    """The test itself, in its own run, shows that it passes without the bug."""
    plant(mutant, copy)
    narrow(copy / "csrc", mutant.killed_by)
    own = (mutant.file.removeprefix("csrc/"),)
    sources = INCLUDED_BY.get(Path(mutant.file).name, own)
    compile_copy(copy / "csrc", copy / "work", sources)
    load = functools.partial(load_cuda_kernels, copy / "work" / LIBRARY)
    assert_killed(mutant, *run_tests(copy, {mutant.killed_by}, monkeypatch, load))
