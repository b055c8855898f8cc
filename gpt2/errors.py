"""The one exception that means: what was given cannot be used."""


class InputError(ValueError):
    """A file, flag or value from the user that cannot be used; the message names it.

    The command line prints it as one line and exits with code 2. Anything else that is raised
    is a bug, and keeps its traceback.
    """


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or the logits of a step are not finite: stopped before using them.

    The command line prints it as one line and exits with code 1.
    """


class WriteError(OSError):
    """A file cannot be written because the disk is full or broken; the message names the file.

    The command line prints it as one line and exits with code 1.
    """

    def __init__(self, path: object, reason: str):
        super().__init__(f"{str(path)!r} cannot be written: {reason}")
        self.path, self.reason = path, reason


def brief(thing: object) -> str:
    """What a message says of something that came from outside: one line, no longer than that."""
    text = " ".join(str(thing).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
