"""Progress bars, rates and messages on stderr."""

import sys

from tqdm import tqdm


def bar(**options) -> tqdm:
    """A progress bar, updated five times a second in a terminal, every ten seconds in a file."""
    if sys.stderr is None:  # it is closed
        options["disable"] = True
        return tqdm(**options)
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)


def per_second(count: float, seconds: float) -> float | None:
    """count / seconds, or None if the clock did not advance."""
    return count / seconds if seconds > 0 else None


def shown(rate: float | None, form: str = ",.0f") -> str:
    """A rate as text; None is "unknown"."""
    return "unknown" if rate is None else format(rate, form)


def say(text: str) -> None:
    """Prints a line on stderr."""
    print(text, file=sys.stderr, flush=True)
