"""The command line: gpt2 train, sample, eval, convert, prepare, tokenizer.

A user's error is one line on stderr and exit code 2. A bug keeps its traceback. Commands import
PyTorch when they run, so that --help answers at once.
"""

import argparse
import errno
import os
import signal
import sys
import warnings

from ..errors import InputError, NonFiniteError, WriteError, brief
from ..files import streams
from . import convert, eval, prepare, sample, tokenizer, train

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 (not finite, full disk or memory), 2 (wrong
    input) or 128 + signal."""
    with streams.checked():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    # OpenMP's threads spin while they wait. With another program on the cores, this made training
    # 20 times slower (two EPYC cores). The variable is read when PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not stream.closed:
            stream.reconfigure(errors="replace")  # for terminals without Unicode
    shown, warnings.showwarning = warnings.showwarning, _warn
    try:
        parser = _parser()
        try:
            options = parser.parse_args(arguments)
        except SystemExit:  # after --version
            sys.stdout.flush()
            raise
        if options.command is None:
            parser.print_help()
            return 0
        code = options.command(options) or 0
        sys.stdout.flush()  # inside the try, so that an error is reported
        return code
    except InputError as e:
        return _fail(str(e), 2)
    except (NonFiniteError, WriteError) as e:
        return _fail(str(e), 1)
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        reason = f" ({brief(e)})" if str(e) else ""
        return _fail(f"out of memory{reason}; try less data or smaller sizes", 1)
    except BrokenPipeError:  # gpt2 sample … | head
        streams.drop(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.filename is None and e.errno in _FULL:  # errors of files are WriteErrors
            streams.drop(sys.stdout)
            return _fail(f"standard output cannot be written: {e.strerror}", 1)
        return _fail(f"{brief(e.filename or 'file')}: {e.strerror or e}", 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        warnings.showwarning = shown


def _is_out_of_memory(error: Exception) -> bool:
    """Whether error means that memory ran out. PyTorch has an exception class for a GPU's memory,
    but not for a CPU's."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or of_torch


def _warn(message: Warning | str, *where) -> None:
    """Prints a warning as one line, without its place in the code."""
    print(f"gpt2: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(f"gpt2: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that do not repeat the usage, and without abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(brief(message))


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from .. import __version__

        print(f"gpt2-kernels {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpt2", description="Train GPT-2 and sample from it.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version"
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for command, help in (
        (train, "train a model"),
        (sample, "write text with a trained model"),
        (eval, "measure perplexity and multiple choice"),
        (convert, "convert a model to another format"),
        (prepare, "turn text into token shards"),
        (tokenizer, "learn a BPE from text"),
    ):
        name = command.__name__.rpartition(".")[2]
        subparser = commands.add_parser(name, help=help, description=command.run.__doc__)
        subparser.set_defaults(command=command.run)
        command.add_flags(subparser)
    return parser
