"""Behaviour that only a GPU shows: streams, CUDA graphs, offsets beyond 2^31, rare races, and the
loss of a training run. The other test files also run on a GPU."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import emulator_vs_gpu
import pytest
import torch
from backends import our_kernels
from processes import TESTS
from safetensors.torch import load_file
from util import bits_equal, environment

from gpt2 import Config, Model, kernels
from gpt2.kernels.native import cuda_toolkit

# Sizes that fill a GPU; tests/tools/pretend_gpu.py has small ones.
B, T, ROWS, V = 8, 1024, 8192, 50257
REPEATS, HUGE = 100, 2**31

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request):
    """Both GPU backends."""
    reason = kernels.why_not(request.param, "gelu", torch.device("cuda", 0), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    with kernels.use(request.param):
        yield request.param


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def every_op():
    """Public ops at sizes that fill a GPU: (function, differentiable inputs)."""
    targets = torch.randint(V, (ROWS // 4,), device="cuda")
    row = randn(768, dtype=torch.float32)
    return {
        "attention": (lambda x: kernels.causal_attention_qkv(x, 12), [randn(B, T, 2304)]),
        "dropout": (
            lambda x: kernels.causal_attention_qkv(x, 12, dropout_p=0.1, seed=5),
            [randn(B, T, 2304)],
        ),
        "layer_norm": (kernels.layer_norm, [randn(ROWS, 768), row, row]),
        "add_layer_norm": (
            lambda *a: torch.cat(kernels.add_layer_norm(*a)),
            [randn(ROWS, 768), randn(ROWS, 768), row, row],
        ),
        "bias_gelu": (kernels.bias_gelu, [randn(ROWS, 3072), randn(3072)]),
        "cross_entropy": (lambda x: kernels.cross_entropy(x, targets), [randn(ROWS // 4, V)]),
        "linear_cross_entropy": (
            lambda x, w: kernels.linear_cross_entropy(x, w, targets),
            [randn(ROWS // 4, 768), randn(V, 768)],
        ),
    }


OPS = ("attention", "dropout", "layer_norm", "add_layer_norm", "bias_gelu", "cross_entropy")
OPS = (*OPS, "linear_cross_entropy")


def result_and_gradients(call, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = call(*leaves)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)


@pytest.mark.parametrize("op", OPS)
def test_repeats_give_the_same_bits(op, request):
    """A race between warps may show in one run of many: 10,000 runs with --full."""
    call, inputs = every_op()[op]
    want = result_and_gradients(call, inputs)
    for _ in range(10_000 if request.config.option.full else REPEATS):
        assert all(map(bits_equal, want, result_and_gradients(call, inputs)))


@pytest.mark.parametrize("op", OPS)
def test_side_streams(op):
    call, inputs = every_op()[op]
    want = result_and_gradients(call, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = result_and_gradients(call, inputs)
    stream.synchronize()
    assert all(map(bits_equal, want, got))


@pytest.mark.parametrize("op", [op for op in OPS if op != "dropout"])
def test_graph_replays_equal_eager(op):
    call, inputs = every_op()[op]
    static = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result_and_gradients(call, static)  # compiles before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = result_and_gradients(call, static)
    for _ in range(2):
        for x in static:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(bits_equal, captured, result_and_gradients(call, static)))


def test_a_training_step_in_a_graph():
    """Forward, backward and AdamW in one captured graph: replays give the losses of eager steps."""
    config = Config(block_size=128, vocab_size=512, n_layer=2, n_embd=256, n_head=4)
    batches = torch.randint(512, (6, 4, 129), device="cuda")
    losses = {}
    for captured in (False, True):
        torch.manual_seed(0)
        model = Model(config, fast=True).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        batch = batches[0].clone()

        def step(model=model, optimizer=optimizer, batch=batch):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                _, loss = model(batch[:, :-1], batch[:, 1:])
            loss.backward()
            optimizer.step()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # PyTorch requires a few steps before the capture
            losses[captured] = [step().clone() for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
        for following in batches[1:]:
            batch.copy_(following)
            if captured:
                graph.replay()
                losses[captured].append(loss.clone())
            else:
                losses[captured].append(step().clone())
    assert losses[True] == losses[False]


def test_a_training_step_does_not_wait():
    """PyTorch raises where the host would wait for the GPU."""
    config = Config(block_size=128, vocab_size=512, n_layer=2, n_embd=256, n_head=4, dropout=0.1)
    model = Model(config, fast=True).cuda()
    idx, targets = torch.randint(512, (2, 4, 128), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = model(idx, targets)
        loss.backward()

    step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.full
@pytest.mark.no_poison
def test_reduce_overhead_captures_the_model():
    """Inductor leaves out its CUDA graph, for example because of an op on a CPU tensor, and says so
    only in a counter."""
    torch._dynamo.reset()
    config = Config(block_size=128, vocab_size=512, n_layer=2, n_embd=256, n_head=4)
    model = Model(config, fast=True).cuda()
    idx, targets = torch.randint(512, (2, 4, 128), device="cuda")
    want = model(idx, targets)[1].item()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        model.zero_grad()
        _, loss = compiled(idx, targets)
        assert loss.item() == pytest.approx(want, rel=1e-5)
        loss.backward()
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_graph_replays_with_fresh_dropout():
    qkv = randn(2, 256, 2304)
    kernels.causal_attention_qkv(qkv, 12, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kernels.causal_attention_qkv(qkv, 12, dropout_p=0.5)
    graph.replay()
    first = o.clone()
    graph.replay()
    assert not bits_equal(first, o)


def beyond_2_to_the_31():
    """Ops whose rows, or sequences, are independent: (function, shape of one row)."""
    row, targets = randn(768, dtype=torch.float32), torch.full((1,), 7, device="cuda")

    def losses(x):  # the sum, because the gradient of the mean depends on the number of rows
        return kernels.cross_entropy(x, targets.expand(len(x))) * len(x)

    return {
        "attention": (lambda x: kernels.causal_attention_qkv(x, 12), (1024, 2304)),
        "layer_norm": (lambda x: kernels.layer_norm(x, row, row), (768,)),
        "add_layer_norm": (lambda x: torch.cat(kernels.add_layer_norm(x, x, row, row), -1), (768,)),
        "gelu": (kernels.gelu, (3072,)),
        "bias_gelu": (lambda x: kernels.bias_gelu(x, row), (768,)),
        "cross_entropy": (losses, (50257,)),
    }


@pytest.mark.full
@pytest.mark.parametrize(
    "op", ["attention", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "cross_entropy"]
)
def test_tensors_beyond_2_to_the_31_elements(op, most_of_the_gpu):
    """The last rows of a tensor with more than 2^31 elements, and their gradients, equal those of
    the rows alone."""
    call, shape = beyond_2_to_the_31()[op]
    few = randn(4, *shape)
    x = few.new_zeros(HUGE // math.prod(shape) + 5, *shape)
    x[-4:] = few

    def tail(x):
        x.requires_grad_()
        y = call(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        return dx[-4:].clone(), y[-4:].detach().clone() if y.dim() else dx[-4:]

    alone = tail(few)
    assert all(map(bits_equal, tail(x), alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_stays_on_course(dtype, request):
    """Losses of fast and plain from the same start over the same steps; GPT-2 124M with --full."""
    full = request.config.option.full
    small = Config(block_size=128, vocab_size=512, n_layer=4, n_head=4, n_embd=256)
    config = Config() if full else small
    steps = 500 if full else 50
    torch.manual_seed(0)
    batches = torch.randint(
        config.vocab_size // 4, (steps, 4, config.block_size + 1), device="cuda"
    )
    losses = {}
    for fast in (False, True):
        torch.manual_seed(0)
        model = Model(config, fast=fast).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        losses[fast] = []
        for batch in batches:
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                _, loss = model(batch[:, :-1], batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[fast].append(loss.detach())
    plain, fast = (torch.stack(losses[k]) for k in (False, True))
    assert (plain - fast).abs().max() < 0.02 * plain[0]
    assert fast[-1] < 0.9 * fast[0]


def sanitized(tool, *arguments):
    """The output of NVIDIA's sanitizer for a Python process, limited to our kernels, because
    racecheck and initcheck report cuDNN and PyTorch."""
    beside = Path(cuda_toolkit.find() or "nvcc").parent
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    watch = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", f"regex={our_kernels()}"]
    env = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", GPT2_TEST_SDPA="math")
    command = [program, *watch, sys.executable, *arguments]
    result = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True)
    if "not supported" in result.stdout and "0 errors" not in result.stdout:
        pytest.skip(f"compute-sanitizer: {result.stdout.splitlines()[-1]}")
    return result


@pytest.mark.full
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool, backend):
    """NVIDIA's checks of every op at ragged sizes."""
    chosen = f"{backend} and (test_packed or test_layer_norm or test_bias_gelu or test_leading)"
    files = [f"kernels/test_{op}.py" for op in ("attention", "layer_norm", "gelu", "cross_entropy")]
    result = sanitized(tool, "-m", "pytest", *files, "-k", chosen, "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.full
def test_compute_sanitizer_watches_our_kernels(backend):
    """A filter that matches no kernel would find nothing: here a text is longer than its cache,
    which must be reported."""
    program = (
        "import torch; from gpt2 import kernels\n"
        "q, cache = (torch.ones(1, T, 1, 32, device='cuda') for T in (1, 5))\n"
        f"kernels.why_not({backend!r}, 'decode_attention', q.device, q.dtype, 32)\n"
        f"decode = kernels.dispatch.module({backend!r}, 'decode_attention').decode_attention\n"
        "decode(q, cache, cache, torch.tensor([999], device='cuda'), 1.0)\n"
        "torch.cuda.synchronize()"
    )
    result = sanitized("memcheck", "-c", program)
    assert result.returncode == 9 and "Invalid __global__ read" in result.stdout, result.stdout


@pytest.mark.long
def test_the_emulator_agrees(backend, tmp_path):
    """Bit for bit without approximations; otherwise to some units in the last place, because sums
    on the tensor cores and approximate functions round differently."""
    if backend != "cuda":
        pytest.skip("its inputs are for the cuda backend")
    file = tmp_path / "emulated.safetensors"
    command = [sys.executable, TESTS / "tools" / "emulator_vs_gpu.py", file]
    subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES=""), check=True)
    emulated = load_file(file)
    for name, x in emulator_vs_gpu.results("cuda").items():
        if name in emulator_vs_gpu.EXACT:
            assert bits_equal(x, emulated[name]), name
        else:
            error = (x.double() - emulated[name].double()).abs().max()
            assert error <= 8 * torch.finfo(x.dtype).eps * emulated[name].double().abs().max(), name
