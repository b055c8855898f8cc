"""The CUDA library for a machine without a GPU: csrc as it is, over a stand-in for CUDA's runtime.

The host's code is compiled and linked as ever, but for the stand-in `runtime`, a library that has
the functions of libcudart that csrc calls. The PTX is of the same compilation: what nvcc makes of
csrc/cuda, before it is translated for one GPU.
"""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from gpt2.kernels import _build, _cache

TITLE = "the CUDA kernels, for an emulated GPU"


def emulated(runtime: Path) -> _build.Library:
    real = _build.LIBRARIES["cuda"]
    return replace(
        real,
        title=TITLE,
        flags=(*real.flags, "-DGPT2_KERNELS_EMULATED_CUDA"),
        link=(*real.link, str(runtime), f"-Xlinker=-rpath,{runtime.parent}"),
        nvcc=("-lineinfo", "-cudart=none"),
        gencode=("-gencode=arch=compute_80,code=compute_80",),
        borrowed=(),
    )


def build_emulated(work: Path, runtime: Path) -> tuple[Path, list[Path]]:
    """The library and the PTX of each source, from this user's cache or built in the folder `work`.

    Beside them lie the object files and build.ninja, for who compiles one source again.
    BuildError where nvcc or a C++ compiler is missing, or fails.
    """
    library = emulated(runtime.resolve())
    tools = _build.find_tools(library)
    key = f"{_build.recipe(library)} {_build.identity(tools)} with objects".encode()
    key += runtime.read_bytes()
    folder = _cache.find_root(create=True) / "cuda-emulated"
    folder.mkdir(mode=0o700, exist_ok=True)
    entry = folder / hashlib.sha256(key).hexdigest()[:16]
    with _cache.locked(folder / "lock", TITLE):
        if not entry.exists():
            new = work / "entry"
            new.mkdir(parents=True)
            keeping = replace(library, nvcc=(*library.nvcc, "-keep", f"-keep-dir={work}"))
            _build.run(keeping, tools, work, new / "libgpt2_kernels_cuda.so")
            for path in (*work.glob("*.ptx"), *work.glob("*.o")):
                shutil.copy(path, new)
            commands = (work / "build.ninja").read_text()
            for built_in in (new, work):
                commands = commands.replace(str(built_in), str(entry))
            (new / "build.ninja").write_text(commands)
            os.replace(shutil.copytree(new, folder / f"tmp-{os.getpid()}"), entry)
    return entry / "libgpt2_kernels_cuda.so", sorted(entry.glob("*.ptx"))
