"""GPT-2 with hand-written kernels: the model, its configuration, and the kernels themselves.

Model, load, graphed and kernels are imported at their first use. They need torch; the command
line's help does not, and some of PyTorch's settings have an effect only before torch is imported.
"""

import importlib

from .config import Config

__version__ = "0.1.0"
__all__ = ["Config", "Model", "graphed", "kernels", "load"]


def __getattr__(name: str):
    if name == "Model":
        return importlib.import_module(".model", __name__).Model
    if name == "load":
        return importlib.import_module(".loading", __name__).load
    if name == "graphed":
        return importlib.import_module(".graphs", __name__).graphed
    if name == "kernels":
        return importlib.import_module(".kernels", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
