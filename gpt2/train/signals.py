"""Ctrl-C and SIGTERM during training: the first stops it after the current step, the second at
once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ..bars import say


@contextmanager
def caught() -> Iterator[list[int]]:
    """A list that receives the number of the first signal, SIGINT or SIGTERM. A second signal has
    its usual effect."""
    caught: list[int] = []
    before = {}

    def note(number, frame):
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        say("\nfinishing this step, then saving; again to quit at once")

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, note)
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
