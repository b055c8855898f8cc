"""The cpu backend's own promises: the same bits on any number of threads, on every instruction set
that runs here; nothing left behind in the process; no instruction where it may not be."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import cpu_set
from util import DTYPES, as_tuple, bits_equal, check_op, guarded

from gpt2 import kernels
from gpt2.kernels import native

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def tensor(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def large_ops(dtype):
    """A call of every op that is large enough for several threads, and of ragged sizes:
    (function, differentiable inputs, whose rows the first axis of the first input holds)."""
    targets = torch.randint(1001, (70,))
    targets[::9] = -100
    row = tensor(769, dtype=dtype)

    def x(*shape):
        return tensor(*shape, dtype=dtype)

    return {
        "causal_attention": (kernels.causal_attention, [x(2, 150, 3, 40) for _ in range(3)]),
        "dropped_attention": (
            lambda q, k, v: kernels.causal_attention(q, k, v, dropout_p=0.3, seed=5),
            [x(1, 70, 3, 64) for _ in range(3)],
        ),
        "causal_attention_qkv": (
            lambda t: kernels.causal_attention_qkv(t, 3),
            [x(2, 150, 3 * 3 * 64)],
        ),
        "layer_norm": (kernels.layer_norm, [x(133, 769), row, row + 1]),
        "add_layer_norm": (kernels.add_layer_norm, [x(133, 769), x(133, 769), row, row + 1]),
        "gelu": (kernels.gelu, [x(50001)]),
        "bias_gelu": (kernels.bias_gelu, [x(133, 769), row]),
        "cross_entropy": (lambda t: kernels.cross_entropy(t, targets), [x(70, 1001)]),
        "linear_cross_entropy": (
            lambda t, w: kernels.linear_cross_entropy(t, w, targets),
            [x(70, 33), x(1001, 33)],
        ),
    }


OPS = list(large_ops(torch.float32))


def run(call, inputs):
    """Outputs and all gradients, for fixed gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = as_tuple(call(*leaves))
    generator = torch.Generator().manual_seed(0)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, dys)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the same bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(op, dtype, cpu_backend):
    if op == "linear_cross_entropy":
        pytest.skip("its products are PyTorch's, which promises nothing; its row kernel is below")
    call, inputs = large_ops(DTYPES[dtype])[op]
    with kernels.use(cpu_backend):
        with threads(1):
            want = run(call, inputs)
        for n in (2, 3, 8, 16):  # attention: whole heads to each, and, at 8 and 16, shared ones
            with threads(n):
                assert all(map(bits_equal, want, run(call, inputs))), f"{n} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_rows_in_place_do_not_depend_on_threads(dtype, cpu_backend):
    fused = torch.ops.gpt2_kernels_cpu.cross_entropy_fwd_bwd_
    logits, targets = tensor(70, 1024, dtype=DTYPES[dtype]), torch.randint(1001, (70,))
    results = []
    for n in (1, 2, 3, 8):
        with threads(n):
            x = logits.clone()
            results.append((fused(x, targets, -1, 0.0, 1001), x))
    for result in results[1:]:
        assert all(map(bits_equal, results[0], result))
    alone = logits[9:10].clone()
    assert bits_equal(fused(alone, targets[9:10], -1, 0.0, 1001), results[0][0][9:10])
    assert bits_equal(alone, results[0][1][9:10])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in OPS if "cross_entropy" not in op and op != "gelu"])
def test_a_row_alone_and_in_a_batch(op, dtype, cpu_backend):
    """Outputs and the gradients of what has rows; the last row, which has the raggedest place."""
    call, inputs = large_ops(DTYPES[dtype])[op]
    rows = len(inputs[0])
    shared = {i for i, x in enumerate(inputs) if x.dim() == 1}
    with kernels.use(cpu_backend):
        leaves = [x.detach().requires_grad_() for x in inputs]
        last = [
            (x if i in shared else x[rows - 1 :]).detach().requires_grad_()
            for i, x in enumerate(inputs)
        ]
        ys, zs = as_tuple(call(*leaves)), as_tuple(call(*last))
        dys = [torch.randn_like(y) for y in ys]
        dxs = torch.autograd.grad(ys, leaves, dys)
        dzs = torch.autograd.grad(zs, last, [dy[rows - 1 :] for dy in dys])
    pairs = [*zip(ys, zs, strict=True)]
    pairs += [(a, b) for i, (a, b) in enumerate(zip(dxs, dzs, strict=True)) if i not in shared]
    if op == "dropped_attention":
        assert rows == 1  # its mask depends on the position in the batch
    for whole, alone in pairs:
        assert bits_equal(whole[rows - 1 :], alone)


def test_loss_of_a_row_alone_and_in_a_batch(cpu_backend):
    x, targets = tensor(70, 1001), torch.randint(1001, (70,))
    losses, stats = torch.ops.gpt2_kernels_cpu.cross_entropy_fwd(x, targets, -1, 0.0)
    dlosses = tensor(70)
    dx = torch.ops.gpt2_kernels_cpu.cross_entropy_bwd(dlosses, x, targets, stats, -1, 0.0)
    one = slice(41, 42)
    loss, stat = torch.ops.gpt2_kernels_cpu.cross_entropy_fwd(x[one], targets[one], -1, 0.0)
    assert bits_equal(loss, losses[one]) and bits_equal(stat, stats[:, one])
    args = (dlosses[one], x[one], targets[one], stat, -1, 0.0)
    assert bits_equal(torch.ops.gpt2_kernels_cpu.cross_entropy_bwd(*args), dx[one])


# ---- gradients in float64


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    """Against finite differences; the scalar set has kernels for float64."""
    row, targets = tensor(11).double(), torch.tensor([3, -100, 0, 12, 5])
    small = {
        "causal_attention": [tensor(2, n, 2, 5) for n in (4, 6, 6)],
        "dropped_attention": [tensor(1, 6, 2, 5) for _ in range(3)],
        "causal_attention_qkv": [tensor(1, 5, 3 * 3 * 4)],
        "layer_norm": [tensor(5, 11), row, row + 1],
        "add_layer_norm": [tensor(5, 11), tensor(5, 11), row, row + 1],
        "gelu": [3 * tensor(2, 11)],
        "bias_gelu": [3 * tensor(5, 11), row],
        "cross_entropy": [tensor(5, 13)],
        "linear_cross_entropy": [tensor(5, 7), tensor(13, 7)],
    }
    call = large_ops(torch.float32)[op][0]
    if op == "cross_entropy":
        call = lambda x: kernels.cross_entropy(x, targets)  # noqa: E731
    if op == "linear_cross_entropy":
        call = lambda x, w: kernels.linear_cross_entropy(x, w, targets)  # noqa: E731
    leaves = [x.double().requires_grad_() for x in small[op]]
    with cpu_set("cpu-scalar"), kernels.use("cpu"):
        assert all(y.dtype == torch.float64 for y in as_tuple(call(*leaves)))
        assert torch.autograd.gradcheck(call, leaves)


# ---- numbers


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_half_precision_number_is_read_and_rounded(dtype, cpu_backend):
    """s = x + residual in float32, rounded to nearest even: subnormals, infinities, overflow."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    weight = torch.ones(64)
    for residual in (torch.zeros_like(x), x, x.flip(0), x[torch.randperm(2**16)]):
        with kernels.use(cpu_backend):
            _, s = kernels.add_layer_norm(x.view(-1, 64), residual.view(-1, 64), weight, weight)
        s, want = s.flatten(), x + residual
        assert torch.equal(s.isnan(), want.isnan())
        finite = ~want.isnan()
        assert bits_equal(s[finite], want[finite])


def test_exp_keeps_its_bound(cpu_backend):
    """dx = exp(x - m) / l where m = 0 and l = 1: exp itself, whose error is that of exp2 and of the
    product x log2(e) before it."""
    x = torch.linspace(-86, 0, 100001)[None]
    args = (torch.ones(1), x, torch.tensor([0]), torch.tensor([[0.0], [1.0]]), -1, 0.0)
    p = torch.ops.gpt2_kernels_cpu.cross_entropy_bwd(*args)[0, 1:].double()
    exact = x[0, 1:].double().exp()
    assert ((p / exact - 1).abs() <= 1.2e-7 + 1.5 * 2.0**-24 * x[0, 1:].abs()).all()
    assert p[-1] == 1


# ---- memory


def test_what_the_library_allocates_is_poisoned(cpu_backend):
    """The statistics of empty rows are never written: they show what all outputs start from."""
    x, row = torch.ones(3, 0), torch.ones(0)
    _, stats = torch.ops.gpt2_kernels_cpu.layer_norm_fwd(x, row, row, 1e-5)
    assert stats.shape == (2, 3) and stats.isnan().all()


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(1, 140), ids=lambda n: f"n{n}")
def test_every_tail(n, dtype, cpu_backend, ran):
    """Rows of every length up to two steps of the widest vectors, between bands of NaN."""
    x = guarded(tensor(3, n, dtype=DTYPES[dtype]))
    row, bias = (guarded(tensor(n, dtype=DTYPES[dtype])) for _ in range(2))
    check_op("gelu", {"x": x}, backend=cpu_backend, ran=ran)
    check_op("bias_gelu", {"x": x, "bias": bias}, backend=cpu_backend, ran=ran)
    cancels = 4 * (x.float().var(-1, correction=0) + 1e-5).rsqrt().max().item() if n <= 16 else 0
    inputs = {"x": x, "weight": row, "bias": bias}
    check_op("layer_norm", inputs, backend=cpu_backend, ran=ran, terms=cancels)
    targets = torch.randint(n, (3,))
    check_op(
        "cross_entropy", {"logits": x}, backend=cpu_backend, ran=ran, terms=1 / 3, targets=targets
    )


# ---- the process


def denormals_alive():
    assert torch.tensor(5e-324, dtype=torch.float64).item() != 0
    many = torch.full((1 << 17,), 1e-310, dtype=torch.float64)  # over PyTorch's threads
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
    """-ffast-math in one shared library turns them off for the whole process."""
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
    """A fork copies no threads; OpenMP, PyTorch's own as well, waits for them in the child."""
    library = 600  # seconds: where AVX-512 is emulated here, the child may have to build its own
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
    assert "needs a CPU tensor, this one is on meta" in why_not(device=torch.device("meta"))
    assert "head size 257 is larger than 256" in why_not("attention", size=257)
    assert "not one of float32, bfloat16, float16" in why_not(dtype=torch.complex64)
    if torch.ops.gpt2_kernels_cpu.isa() != "scalar":
        assert "float64" in why_not(dtype=torch.float64)
    with cpu_set("cpu-scalar"):
        assert why_not(dtype=torch.float64) is None
    with pytest.raises(RuntimeError, match=r"must be one of .*, got mmx"):
        torch.ops.gpt2_kernels_cpu.use_isa("mmx")


# ---- the library's code

# A symbol's instruction set is its namespace; the rest belongs to every x86-64.
SETS = re.compile(r"\bgpt2::(avx512_bf16|avx512|avx2|scalar)::|kernels_(avx512_bf16|avx512|avx2)\(")
WIDE = re.compile(r"%zmm|%k[0-7]\b|\{%k|%[xy]mm(1[6-9]|2\d|3[01])\b|\bvdpbf16ps")
VEX = re.compile(r"%ymm|\bv[a-z0-9]+\s.*%xmm")


@pytest.mark.cpu_kernels
def test_no_instruction_outside_of_its_set():
    """One AVX-512 instruction in a function that every machine runs ends the process on most; the
    linker may take such a function, an inline one, from any object file that has it."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        [objdump, "-d", "-C", "--no-show-raw-insn", native.build("cpu")],
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
    """T = 8192: one head's scores would be 268 MB; what there is grows with T."""
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
