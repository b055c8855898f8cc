"""The six numbers that define a GPT-2, and the four published sizes."""

from dataclasses import dataclass, fields
from numbers import Integral

_NAMED = {  # name: (n_layer, n_head, n_embd), as published
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True)
class Config:
    """The shape of a GPT-2. Lengths are in tokens, widths in features; all counts are positive.

    Raises ValueError, naming the field, for a value that no model can have.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "dropout":
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise TypeError(f"dropout must be a number, got {value!r}")
                if not 0.0 <= value < 1.0:
                    raise ValueError(f"dropout must be at least 0 and below 1, got {value}")
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{field.name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
            object.__setattr__(self, field.name, int(value))  # NumPy's integers too
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be divisible by n_head, "
                f"got n_embd={self.n_embd}, n_head={self.n_head}"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def named(cls, name: str, **overrides) -> "Config":
        """The configuration of a published size: gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
        if name not in _NAMED:
            raise ValueError(f"name must be one of {', '.join(_NAMED)}, got {name!r}")
        n_layer, n_head, n_embd = _NAMED[name]
        return cls(**{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **overrides})
