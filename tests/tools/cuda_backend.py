"""The cuda backend for tests: on a GPU if there is one, else its PTX on the emulator."""

import contextlib
import functools
import re
import tempfile
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()


@functools.cache
def why_not() -> str | None:
    """None if the backend runs here, else the reason. Builds the library if necessary."""
    from gpt2.kernels.native import cuda, libraries

    if ON_GPU:
        return cuda._device_reason("cuda", None)
    if _loaded:
        return None
    from emulated_library import build_emulated
    from ptx_emulator import cuda_device

    try:
        with tempfile.TemporaryDirectory() as work:
            load(*build_emulated(Path(work), cuda_device.build()))
    except (libraries.BuildError, RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return None


_loaded: list[Path] = []
emulated_kernels: list[str] = []  # mangled names of the loaded library's kernels


def load(library: Path, ptx: list[Path]) -> None:
    """Loads the emulated library's operators and its kernels."""
    from ptx_emulator import cuda_device

    texts = [path.read_text() for path in ptx]
    cuda_device.load(library, texts)
    torch.ops.load_library(str(library))
    _loaded.append(library)
    emulated_kernels.extend(re.findall(r"\.entry\s+([\w$]+)", "\n".join(texts)))


def built() -> Path:
    """The folder in which the library was built, with its object files, PTX and build.ninja."""
    return _loaded[0].parent


@contextlib.contextmanager
def serving(monkeypatch, **options):
    """A context in which kernels.use("cuda") computes the tests' tensors. Yields the emulated
    device, or None on a GPU. Launches may access memory allocated within the context, and the
    memory of their arguments."""
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    if ON_GPU:
        yield None
        return
    from ptx_emulator import cuda_device

    from gpt2.kernels.native import cuda

    with cuda_device.EmulatedDevice(**options) as device:
        monkeypatch.setattr(cuda, "_device_reason", lambda device_type, index: None)
        operators = _Operators(torch.ops.gpt2_kernels_cuda, device)
        monkeypatch.setattr(cuda, "module", lambda op: operators)
        yield device


class _Operators:
    """Wraps the library's operators: during a call the device also accepts memory that it did not
    allocate, such as a file's."""

    def __init__(self, library, device):
        self.library, self.device = library, device

    def __getattr__(self, name):
        operator = getattr(self.library, name)

        def call(*args):
            with self.device.allowing(*(x for x in args if isinstance(x, torch.Tensor))):
                return operator(*args)

        return call
