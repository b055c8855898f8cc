"""Errors that the command line prints as one line, and text from outside, shortened."""


class InputError(ValueError):
    """A file, flag or value from the user that cannot be used; the message names it.

    The command line prints it as one line and exits with code 2. Anything else that is raised
    is a bug, and keeps its traceback.
    """


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or the logits of a step are not finite. Raised before they are used.

    The command line prints it as one line and exits with code 1.
    """


class WriteError(OSError):
    """A file cannot be written because the disk is full or broken; the message names the file.

    The command line prints it as one line and exits with code 1.
    """

    def __init__(self, path: object, reason: str):
        super().__init__(f"{quoted(path)} cannot be written: {reason}")
        self.path, self.reason = path, reason


def brief(thing: object) -> str:
    """External text, shortened to one line of at most 200 characters."""
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else f"{text[:199]}…"


def quoted(name: object) -> str:
    """An external name in quotes, on one line of at most 200 characters; a longer name keeps its
    start and its end."""
    text = repr(str(name))
    return text if len(text) <= 200 else f"{text[:60]}…{text[-139:]}"
