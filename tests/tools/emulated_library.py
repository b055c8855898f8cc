"""The CUDA library for a machine without a GPU: the code of csrc, with a replacement for CUDA's
runtime.

The host code is compiled and linked as usual, except that `runtime`, a library with the functions
of libcudart that csrc calls, replaces libcudart. The same compilation produces the PTX: nvcc's
output for csrc/cuda before it is translated for one GPU.
"""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from gpt2.kernels.native import build_cache, compiler, recipes

TITLE = "the CUDA kernels, for an emulated GPU"


def emulated(runtime: Path) -> recipes.Library:
    real = recipes.LIBRARIES["cuda"]
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
    """Returns the library and the PTX of each source, from the user's cache or built in the folder
    `work`.

    The object files and build.ninja are kept beside them, so that one source can be compiled again.
    Raises BuildError if nvcc or a C++ compiler is missing or fails.
    """
    library = emulated(runtime.resolve())
    tools = compiler.find_tools(library)
    key = f"{compiler.recipe(library)} {compiler.identity(tools)} with objects".encode()
    key += runtime.read_bytes()
    folder = build_cache.find_root(create=True) / "cuda-emulated"
    folder.mkdir(mode=0o700, exist_ok=True)
    entry = folder / hashlib.sha256(key).hexdigest()[:16]
    with build_cache.locked(folder / "lock", TITLE):
        if not entry.exists():
            new = work / "entry"
            new.mkdir(parents=True)
            keeping = replace(library, nvcc=(*library.nvcc, "-keep", f"-keep-dir={work}"))
            compiler.run(keeping, tools, work, new / "libgpt2_kernels_cuda.so")
            for path in (*work.glob("*.ptx"), *work.glob("*.o")):
                shutil.copy(path, new)
            commands = (work / "build.ninja").read_text()
            for built_in in (new, work):
                commands = commands.replace(str(built_in), str(entry))
            (new / "build.ninja").write_text(commands)
            os.replace(shutil.copytree(new, folder / f"tmp-{os.getpid()}"), entry)
    return entry / "libgpt2_kernels_cuda.so", sorted(entry.glob("*.ptx"))
