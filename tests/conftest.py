"""How every test runs: where there is no GPU, Triton kernels in the repaired interpreter; fresh
random inputs; memory that nobody has written yet full of NaN.

    pytest tests/            every op, backend and bug class: a fair sample of the grid
    pytest tests/ --full     the whole grid

Both in several processes, unless -n 0 says otherwise: see workers().
"""

import contextlib
import fcntl
import functools
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's small products: threads only wait

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cuda_backend
from counts import Counts
from emulation import emulation
from shares import backends_of, keep_those_of, long_ones_first, sample, workers

ON_GPU = torch.cuda.is_available()
# Triton's kernels compiled, and their PTX run: a process of its own, as a function that Triton has
# decorated is interpreted or compiled for good. tests/test_triton_ptx.py starts it.
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
        import interpreter

        interpreter.install()

if os.environ.get("GPT2_TEST_SDPA") == "math":  # plain PyTorch's attention without fused kernels
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)

GPU_MEMORY_OF_THE_LARGEST_TEST = 64 << 30
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")  # instruction sets of the cpu backend


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the whole grid, not a sample of it")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite goes to several processes, of one thread each, where pytest-xdist is there;
    -n 0 leaves it to one. A process that is done takes tests from another: in xdist's own way, one
    that had begun with a test of minutes kept dozens of others waiting on an H200."""
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
    """Inputs of its own for each test, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """torch.empty and its like return NaN (integers: the lowest there are), never old zeros.

    Not where there is nothing to fill, and not leaves of a gradient, which may not be written to:
    torch.utils.checkpoint asks for torch.empty((0,), requires_grad=True).
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


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    """A run measures its machine's peak for no longer than it must."""
    monkeypatch.setattr("gpt2.machine.PEAK_SECONDS", 0.0)


@pytest.fixture
def most_of_the_gpu():
    """For tensors of tens of gigabytes: one such test at a time, in whichever process."""
    if torch.cuda.get_device_properties(0).total_memory < GPU_MEMORY_OF_THE_LARGEST_TEST:
        pytest.skip(f"needs a GPU with {GPU_MEMORY_OF_THE_LARGEST_TEST >> 30} GiB of memory")
    with open(Path(tempfile.gettempdir(), f"gpt2-tests-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def ran(request):
    """Called with a backend's name for each of its results that is compared: the summary counts."""
    return lambda backend: request.node.user_properties.append(("compared", backend))


@pytest.fixture
def own_coverage(monkeypatch):
    """What the test emulates is no kernel of ours: it does not count."""
    from emulator import coverage

    fresh = type(coverage)()
    for name, value in vars(fresh).items():
        monkeypatch.setattr(coverage, name, value)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A small library in place of csrc: toy.py."""
    from toy import Toy

    toy = Toy(tmp_path, monkeypatch)
    yield toy
    toy.hold.unlink(missing_ok=True)  # a test that failed leaves nobody waiting


TRITON = pytest.param("triton", marks=pytest.mark.triton)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda_kernels)
CPU = pytest.param("cpu", marks=pytest.mark.cpu_kernels)
CPU_SETS = [pytest.param(f"cpu-{isa}", marks=pytest.mark.cpu_kernels) for isa in ISAS]


@pytest.fixture(params=["reference", TRITON, CUDA, CPU])
def backend(request, monkeypatch):
    """Every backend: what none may do differently."""
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture
def slow_when_emulated(accelerated, request):
    """What takes tens of seconds in an interpreter runs there with --full alone."""
    emulated = accelerated != "cpu" and not torch.cuda.is_available()
    if emulated and not request.config.getoption("--full"):
        pytest.skip("runs with --full")


@pytest.fixture(params=[TRITON, CUDA, CPU])
def accelerated(request, monkeypatch):
    """Every backend but the reference, where its instruction set does not matter."""
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture(params=[TRITON, CUDA, *CPU_SETS])
def kernel_backend(request, monkeypatch):
    """The name of every backend but the reference; of cpu, with each instruction set in turn."""
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture(params=CPU_SETS)
def cpu_backend(request, monkeypatch):
    with serving(request.param, monkeypatch):
        yield request.param.partition("-")[0]


@pytest.fixture
def without_the_interpreter():
    """Fast models run on the kernels that serve this machine, not on Triton's interpreter."""
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
    """transformers' models on our kernels: those of this machine, never the interpreter's."""
    from their_gpt2 import BACKEND

    from gpt2 import kernels

    with kernels.use(BACKEND):
        yield


@pytest.fixture
def no_sdpa(monkeypatch):
    """In transformers' models PyTorch's attention computes nothing in our kernels' place."""
    from gpt2 import transformers_attention

    monkeypatch.setattr(
        transformers_attention, "sdpa_attention_forward", lambda *a, **k: pytest.fail("SDPA serves")
    )


def serving(param, monkeypatch, **options):
    """Within it the backend serves the tests' tensors; an emulated device, if it is one, is what it
    yields, and the options are its."""
    name = param.partition("-")[0]
    if name == "cuda":
        return cuda_backend.serving(monkeypatch, **options)
    if name == "triton" and EMULATE_TRITON:
        return emulated_triton(monkeypatch, **options)
    return cpu_set(param)


@contextlib.contextmanager
def emulated_triton(monkeypatch, **options):
    """Triton's kernels on CPU tensors: compiled for sm_80, their PTX run by the emulator."""
    from emulator import triton_device

    from gpt2.kernels import triton

    monkeypatch.setattr(triton, "_cached_device_reason", lambda device_type, index: None)
    with triton_device.active(**options) as device:
        yield device


@contextlib.contextmanager
def cpu_set(param):
    """ "cpu-avx2" forces that instruction set. What the library allocates is NaN, too, until it is
    written: torch.empty within C++ is out of poisoned_memory's reach."""
    isa = param.partition("-")[2]
    if not isa:
        yield
        return
    library = torch.ops.gpt2_kernels_cpu
    before, deterministic = library.isa(), torch.are_deterministic_algorithms_enabled()
    library.use_isa(isa)
    torch.use_deterministic_algorithms(True, warn_only=True)  # at::empty fills what it returns
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        library.use_isa(before)


def isa_of(item):
    """The instruction set that a test forces, or an empty string."""
    return next(iter(backends_of(item)), "").partition("-")[2]


@contextlib.contextmanager
def avx512_emulated():
    """With GPT2_TEST_AVX512=1, on a machine without AVX-512: the library is compiled over an
    emulation of its instructions (tests/avx512), and so runs every set that a test asks for."""
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    if has_avx512 or os.environ.get("GPT2_TEST_AVX512") != "1":
        yield
        return
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CXX", str(Path(__file__).parent / "avx512" / "c++"))
        environment.setenv("GPT2_KERNELS_ISA", "avx2")
        yield


@functools.cache
def why_no_cpu_kernels(isa):
    """None where the cpu backend runs here, with this instruction set if one is given; else why it
    does not. Builds the library where that has not been done."""
    if ON_GPU:
        return "the tests' tensors are on the GPU"
    from gpt2.kernels import cpu

    with avx512_emulated():
        reason = cpu._library_reason()
    if reason is not None:
        return reason
    here = torch.ops.gpt2_kernels_cpu.isas().split()
    if "avx512" not in here and os.environ.get("GPT2_TEST_AVX512") == "1":
        raise pytest.UsageError("the native library was loaded before its tests set it up")
    return None if not isa or isa in here else f"this machine runs {', '.join(here)}"


def pytest_report_header(config):
    if ON_GPU:
        return f"Triton and CUDA kernels on {torch.cuda.get_device_name()}"
    missing = f" ({NO_TRITON})" if NO_TRITON else ""
    return f"no GPU: Triton kernels in the interpreter{missing}, CUDA kernels on the emulator"
