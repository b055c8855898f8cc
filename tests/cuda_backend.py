"""The cuda backend in tests: on a GPU where there is one, else its exact PTX on the emulator."""

import contextlib
import functools
import re
import tempfile
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()


@functools.cache
def why_not() -> str | None:
    """None where it runs here, else the reason. Builds the library where that has not been done."""
    from gpt2.kernels import cuda, native

    if ON_GPU:
        return cuda._cached_device_reason("cuda", None)
    if _loaded:
        return None
    from emulated_library import build_emulated
    from emulator import cuda_device

    try:
        with tempfile.TemporaryDirectory() as work:
            load(*build_emulated(Path(work), cuda_device.build()))
    except (native.BuildError, RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return None


_loaded: list[Path] = []
emulated_kernels: list[str] = []  # the mangled names of the library's, once it is loaded


def load(library: Path, ptx: list[Path]) -> None:
    """The emulated library's operators, and its kernels."""
    from emulator import cuda_device

    texts = [path.read_text() for path in ptx]
    cuda_device.load(library, texts)
    torch.ops.load_library(str(library))
    _loaded.append(library)
    emulated_kernels.extend(re.findall(r"\.entry\s+([\w$]+)", "\n".join(texts)))


def built() -> Path:
    """The folder that the library was built in: with its object files, PTX and build.ninja."""
    return _loaded[0].parent


@contextlib.contextmanager
def serving(monkeypatch, **options):
    """Within it kernels.use("cuda") serves the tests' tensors; yields the emulated device, or None
    on a GPU. Launches may touch what was allocated within it, and the arguments' own memory."""
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    if ON_GPU:
        yield None
        return
    from emulator import cuda_device

    from gpt2.kernels import cuda

    with cuda_device.EmulatedDevice(**options) as device:
        monkeypatch.setattr(cuda, "_cached_device_reason", lambda device_type, index: None)
        operators = _Operators(torch.ops.gpt2_kernels_cuda, device)
        monkeypatch.setattr(cuda, "module", lambda op: operators)
        yield device


class _Operators:
    """The library's operators; memory that the device has not handed out, a file's say, is known to
    it for the time of a call."""

    def __init__(self, library, device):
        self.library, self.device = library, device

    def __getattr__(self, name):
        operator = getattr(self.library, name)

        def call(*args):
            with self.device.allowing(*(x for x in args if isinstance(x, torch.Tensor))):
                return operator(*args)

        return call
