"""GPT-2 with hand-written kernels: the model, its configuration, and the kernels themselves."""

from . import kernels
from .config import Config
from .model import Model

__version__ = kernels.__version__
__all__ = ["Config", "Model", "kernels"]
