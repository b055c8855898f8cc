"""Marks functions that torch.compile calls during tracing and whose results become constants.

torch.compiler.assume_constant_result sets the same mark, but it imports the compiler, which takes
longer than importing the rest of this package.
"""

import functools
from collections.abc import Callable


def untraced(function: Callable) -> Callable:
    """Marks function: torch.compile calls it instead of tracing it."""
    function._dynamo_marked_constant = True
    return function


def cached_untraced(function: Callable) -> Callable:
    """functools.cache for a function that torch.compile must not trace."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def wrapper(*args):
        return cached(*args)

    return untraced(wrapper)
