"""The CPU library in a process: denormals, fork, instruction sets, memory."""

import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from backends import cpu_set
from cpu_ops import CPU, OPS, large_ops, run, threads
from processes import ROOT

from gpt2 import kernels
from gpt2.kernels.native import libraries


def denormals_alive():
    assert torch.tensor(5e-324, dtype=torch.float64).item() != 0
    many = torch.full((1 << 17,), 1e-310, dtype=torch.float64)  # uses PyTorch's threads
    assert (many * 1 != 0).all()
    assert (torch.full((1 << 17,), 1e-40) * 1 != 0).all()


def on_a_thread(function):
    failed = []

    def body():
        try:
            function()
        except AssertionError as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("op", OPS)
def test_denormals_stay_alive(op, cpu_backend):
    """-ffast-math in one shared library flushes denormals for the whole process."""
    denormals_alive()
    call, inputs = large_ops(torch.float32)[op]
    with kernels.use(cpu_backend), threads(2):
        run(call, inputs)
        denormals_alive()
        on_a_thread(denormals_alive)
        on_a_thread(lambda: (run(call, inputs), denormals_alive()))


FORK = """
import os, sys, torch
from gpt2 import kernels
torch.set_num_threads(2)
x, w = torch.randn(64, 769), torch.randn(769)
q = torch.randn(1, 200, 4, 64)
def ops():
    with kernels.use("cpu"):
        ys = kernels.layer_norm(x, w, w), kernels.gelu(x), kernels.causal_attention(q, q, q)
    return [y.numpy().tobytes() for y in ys]  # PyTorch's own ops would hang in the child
want = ops()
pid = os.fork()
if pid == 0:
    os._exit(0 if ops() == want else 3)
_, status = os.waitpid(pid, 0)
assert ops() == want
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use():
    """A fork copies no threads; in the child OpenMP, PyTorch's own included, would wait for
    them."""
    library = 600  # seconds: with emulated AVX-512 the child may have to build a library
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=library, cwd=ROOT)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import torch; from gpt2 import kernels\n{code}"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.cpu_kernels
def test_the_environment_names_the_instruction_set():
    code = "print(kernels.why_not('cpu', 'gelu', torch.device('cpu'), torch.float32))\n"
    done = python(code + "print(torch.ops.gpt2_kernels_cpu.isa())", GPT2_KERNELS_ISA="scalar")
    assert done.stdout.split() == ["None", "scalar"], done.stderr
    done = python(code, GPT2_KERNELS_ISA="mmx")
    assert "GPT2_KERNELS_ISA=mmx: this machine runs" in done.stdout, done.stderr


@pytest.mark.cpu_kernels
def test_reasons():
    def why_not(op="gelu", device=CPU, dtype=torch.float32, size=0):
        return kernels.why_not("cpu", op, device, dtype, size)

    assert why_not() is None and why_not("attention", size=256) is None
    assert "needs a CPU tensor, got one on meta" in why_not(device=torch.device("meta"))
    assert "head size 257 is larger than 256" in why_not("attention", size=257)
    assert "not one of float32, bfloat16, float16" in why_not(dtype=torch.complex64)
    if torch.ops.gpt2_kernels_cpu.isa() != "scalar":
        assert "float64" in why_not(dtype=torch.float64)
    with cpu_set("cpu-scalar"):
        assert why_not(dtype=torch.float64) is None
    with pytest.raises(RuntimeError, match=r"must be one of .*, got mmx"):
        torch.ops.gpt2_kernels_cpu.use_isa("mmx")


# A symbol's namespace is its instruction set; other code is for every x86-64.
SETS = re.compile(r"\bgpt2::(avx512_bf16|avx512|avx2|scalar)::|kernels_(avx512_bf16|avx512|avx2)\(")
WIDE = re.compile(r"%zmm|%k[0-7]\b|\{%k|%[xy]mm(1[6-9]|2\d|3[01])\b|\bvdpbf16ps")
VEX = re.compile(r"%ymm|\bv[a-z0-9]+\s.*%xmm")


@pytest.mark.cpu_kernels
def test_no_instruction_outside_of_its_set():
    """An AVX-512 instruction in a function that every machine runs would kill the process on most
    machines. The linker may take such an inline function from any object file."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", libraries.build("cpu")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    seen = set()
    for block in listing.split("\n\n"):
        head, _, body = block.partition("\n")
        found = SETS.search(head)
        isa = (found.group(1) or found.group(2)) if found else "scalar"
        seen.add(isa)
        if not isa.startswith("avx512"):
            assert not WIDE.search(body), f"AVX-512 in {head}"
        if isa == "scalar":
            assert not VEX.search(body), f"AVX in {head}"
    assert seen >= {"scalar"}


@pytest.mark.cpu_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_of_attention_does_not_grow_with_the_square_of_T():
    """At T = 8192 the scores of one head would be 268 MB; the allowed memory grows with T."""
    code = """
import resource, torch
from gpt2 import kernels
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(T):
    q, k, v = torch.randn(3, 1, T, 1, 16).requires_grad_()
    with kernels.use("cpu"):
        kernels.causal_attention(q, k, v).sum().backward()
run(64)
before = peak()
run(8192)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, done.stdout
