"""Settings and fixtures of all tests. Without a GPU, Triton kernels run in the repaired
interpreter. Every test gets its own random inputs; uninitialized memory is filled with NaN.

    pytest tests/            every op, backend and bug class: a sample of the grid
    pytest tests/ --full     the whole grid

Both run in several processes unless -n 0 is given: see workers().
"""

import fcntl
import os
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's small products: more threads only wait

import cuda_backend
import pytest
import torch
from backends import CPU, CPU_SETS, CUDA, TRITON, isa_of, serving, why_no_cpu_kernels
from counts import Counts
from emulation import emulation
from shares import keep_those_of, long_ones_first, sample, workers

from gpt2.kernels import recording

ON_GPU = torch.cuda.is_available()
# Compiles Triton's kernels and runs their PTX. This needs a separate process, because a decorated
# function is either interpreted or compiled for the whole process. tests/builds/test_triton_ptx.py
# starts it.
EMULATE_TRITON = os.environ.get("GPT2_TEST_TRITON") == "emulator"
if EMULATE_TRITON:
    os.environ.pop("TRITON_INTERPRET", None)
    NO_TRITON = None
elif ON_GPU:
    NO_TRITON = None
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in every process of the tests
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    try:
        import triton  # noqa: F401
    except ImportError:
        NO_TRITON = "triton is not installed: its interpreter cannot stand in for a GPU"
    else:
        NO_TRITON = None
        import triton_interpreter

        triton_interpreter.install()

if os.environ.get("GPT2_TEST_SDPA") == "math":  # plain PyTorch's attention without fused kernels
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)

GPU_MEMORY_OF_THE_LARGEST_TEST = 64 << 30


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the whole grid, not a sample of it")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Runs the whole suite in several processes of one thread each if pytest-xdist is installed; -n
    0 uses one process. Idle processes take tests from busy ones (worksteal): with xdist's default,
    one process with a test of minutes kept dozens of other tests waiting on an H200."""
    option = config.option
    within = "PYTEST_XDIST_WORKER" in os.environ
    if within or not config.pluginmanager.hasplugin("xdist") or option.dist != "no":
        return
    whole = all(Path(arg).is_dir() for arg in config.args)
    seen = option.usepdb or option.collectonly or option.capture == "no"
    if whole and not seen and option.numprocesses is None:
        memory = torch.cuda.get_device_properties(0).total_memory if ON_GPU else None
        option.numprocesses = workers(os.cpu_count() or 1, memory)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if option.numprocesses:
        option.dist = "worksteal"


def pytest_configure(config):
    grid = "grid(full=N): one of many cases; sampled, with --full one in N. one_dtype=True: of "
    grid += "Triton's emulated kernels those of bfloat16, as another test runs every dtype's code"
    config.addinivalue_line("markers", grid)
    config.addinivalue_line("markers", "full: runs only with --full")
    config.addinivalue_line("markers", "long: takes long, and begins before the others")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "triton: needs a GPU, or Triton's interpreter in its place")
    config.addinivalue_line("markers", "cuda_kernels: needs nvcc, and a GPU or the emulator")
    config.addinivalue_line("markers", "cpu_kernels: needs the native library, built at first use")
    config.addinivalue_line("markers", "no_poison: leaves torch.empty as it is")
    config.pluginmanager.register(Counts(config, NO_TRITON))
    config.pluginmanager.register(emulation)
    recording.UNRECORDED = 2  # so that tests of a few steps replay calls, too
    recording.start()


def pytest_collection_modifyitems(config, items):
    if EMULATE_TRITON:
        keep_those_of("triton", config, items)
    for item in items:
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; none is present"))
        if "triton" in item.keywords and NO_TRITON:
            item.add_marker(pytest.mark.skip(reason=NO_TRITON))
        if "cpu_kernels" in item.keywords and (reason := why_no_cpu_kernels(isa_of(item))):
            item.add_marker(pytest.mark.skip(reason=reason))
        if "cuda_kernels" in item.keywords and (reason := cuda_backend.why_not()):
            item.add_marker(pytest.mark.skip(reason=reason))
        if "full" in item.keywords and not config.option.full:
            item.add_marker(pytest.mark.skip(reason="runs with --full"))
    if not any("::" in arg for arg in config.args):
        sample(config, items)
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = long_ones_first(items, processes)


@pytest.fixture(autouse=True)
def fresh_random_numbers(request):
    """Seeds the random numbers of each test: different per test, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """Makes torch.empty and similar functions return NaN (integers: the lowest value), never old
    zeros.

    Skips empty tensors, and leaves that require a gradient, because writing to them raises:
    torch.utils.checkpoint calls torch.empty((0,), requires_grad=True).
    """
    if "no_poison" in request.keywords:
        return

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.requires_grad or not x.numel():
                return x
            if x.is_floating_point():
                return x.fill_(float("nan"))
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).min)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=ON_GPU)
def no_pending_checks():
    """Forgets the checks of ids whose results no one has read: they would fail the next test."""
    yield
    from gpt2.kernels import ids

    ids._checks.clear()


@pytest.fixture(autouse=True)
def no_recordings():
    """Forgets the calls that other tests recorded: a test may replace what they were made of."""
    recording.forget()


@pytest.fixture
def replaying():
    """Fails a test of replays if calls are not replayed here."""
    assert recording.why_not() is None


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    """Shortens the measurement of the machine's peak rate at the start of a run."""
    monkeypatch.setattr("gpt2.device.PEAK_SECONDS", 0.0)


@pytest.fixture
def most_of_the_gpu():
    """Lets only one test at a time, over all processes, allocate tens of gigabytes."""
    if torch.cuda.get_device_properties(0).total_memory < GPU_MEMORY_OF_THE_LARGEST_TEST:
        pytest.skip(f"needs a GPU with {GPU_MEMORY_OF_THE_LARGEST_TEST >> 30} GiB of memory")
    with open(Path(tempfile.gettempdir(), f"gpt2-tests-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def ran(request):
    """Returns a function that counts a compared result for a backend; the summary prints the
    counts."""
    return lambda backend: request.node.user_properties.append(("compared", backend))


@pytest.fixture
def own_coverage(monkeypatch):
    """Keeps PTX that is not from our kernels out of the coverage report."""
    from ptx_emulator import coverage

    fresh = type(coverage)()
    for name, value in vars(fresh).items():
        monkeypatch.setattr(coverage, name, value)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small library that replaces csrc: small_library.py."""
    from small_library import SmallLibrary

    small = SmallLibrary(tmp_path, monkeypatch)
    yield small
    small.hold.unlink(missing_ok=True)  # so that no process waits after a failed test


@pytest.fixture(params=["reference", TRITON, CUDA, CPU])
def backend(request, monkeypatch):
    """Every backend, for behaviour that all must share."""
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture
def slow_when_emulated(accelerated, request):
    """Skips tests that take tens of seconds in the interpreter, except with --full."""
    emulated = accelerated != "cpu" and not torch.cuda.is_available()
    if emulated and not request.config.getoption("--full"):
        pytest.skip("runs with --full")


@pytest.fixture(params=[TRITON, CUDA, CPU])
def accelerated(request, monkeypatch):
    """Every backend but the reference, if the instruction set does not matter."""
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture(params=[TRITON, CUDA, *CPU_SETS])
def kernel_backend(request, monkeypatch):
    """The name of every backend but the reference; cpu once per instruction set."""
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture(params=CPU_SETS)
def cpu_backend(request, monkeypatch):
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture
def without_the_interpreter():
    """Makes fast models use this machine's own kernels instead of Triton's interpreter."""
    from util import DEVICE

    from gpt2 import kernels

    if DEVICE != "cpu":
        yield
        return
    float32 = torch.device("cpu"), torch.float32
    served = kernels.why_not("cpu", "attention", *float32) is None
    with kernels.use("cpu" if served else "reference"):
        yield


@pytest.fixture
def served_by_one_backend():
    """Runs transformers' models on this machine's own kernels, never on the interpreter's."""
    from their_gpt2 import BACKEND

    from gpt2 import kernels

    with kernels.use(BACKEND):
        yield


@pytest.fixture
def late(monkeypatch):
    """A device whose results come late (tools/late.py), with no checks of ids pending."""
    from late import Late

    from gpt2.kernels import ids

    monkeypatch.setattr(ids, "_checks", {})
    return Late(monkeypatch)


@pytest.fixture
def captures(monkeypatch):
    """Counts of captured and replayed CUDA graphs, which a CPU plays (tools/fake_graphs.py)."""
    from fake_graphs import Counts

    return Counts(monkeypatch)


@pytest.fixture
def no_sdpa(monkeypatch):
    """Makes PyTorch's attention raise, so that it cannot replace our kernels unnoticed."""
    from gpt2.interop import transformers_attention

    monkeypatch.setattr(
        transformers_attention, "sdpa_attention_forward", lambda *a, **k: pytest.fail("SDPA serves")
    )


def pytest_report_header(config):
    if ON_GPU:
        return f"Triton and CUDA kernels on {torch.cuda.get_device_name()}"
    missing = f" ({NO_TRITON})" if NO_TRITON else ""
    return f"no GPU: Triton kernels in the interpreter{missing}, CUDA kernels on the emulator"
