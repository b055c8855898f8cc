"""Makes `import kernels`, from the root of this repository, an alias of gpt2.kernels.

In the repository, Python finds this folder as a top-level package; once installed, it is only
gpt2.kernels. A second copy of the modules would register the same ops twice, so `kernels` becomes
another name for gpt2.kernels, submodules included. But an unrelated library on PyPI has the same
name, and transformers imports it. If that library is installed, `kernels` is that library.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_OURS = Path(__file__).resolve().parent


def stand_aside() -> None:
    """Replaces sys.modules["kernels"] by the library of that name, or by gpt2.kernels."""
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != _OURS.parent]
    spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent != _OURS:
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)
    else:
        sys.meta_path.insert(0, _SameModules())
        sys.modules["kernels"] = importlib.import_module("gpt2.kernels")


class _SameModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds kernels.x as the module gpt2.kernels.x itself."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("kernels.") or name == "kernels.__main__":
            return None
        if importlib.util.find_spec(f"gpt2.{name}") is None:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        module = importlib.import_module(f"gpt2.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        # The import system has just set the alias's spec on the module: restore its own.
        module.__spec__ = module.__spec__.loader_state
