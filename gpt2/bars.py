"""Progress of whatever takes long, on stderr, and how fast it goes."""

import sys

from tqdm import tqdm


def bar(**options) -> tqdm:
    """A progress bar, which a terminal sees five times a second and a file every ten seconds."""
    if sys.stderr is None:  # it is closed
        options["disable"] = True
        return tqdm(**options)
    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)


def per_second(count: float, seconds: float) -> float | None:
    """count / seconds; None where the clock did not advance, so that nothing is known."""
    return count / seconds if seconds > 0 else None


def shown(rate: float | None, form: str = ",.0f") -> str:
    """A rate as a line of text has it."""
    return "unknown" if rate is None else format(rate, form)
