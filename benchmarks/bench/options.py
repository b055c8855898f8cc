"""The command line that all scripts share. It is validated before anything runs."""

import argparse
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Shape

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def parse_shape(text: str, dims: str) -> Shape:
    """ "2x64" as "NxC" is Shape(N=2, C=64). Raises ValueError for other text."""
    letters, sizes = dims.split("x"), text.split("x")
    if len(sizes) != len(letters) or not all(s.isdecimal() and int(s) > 0 for s in sizes):
        raise ValueError(f"{text!r} is not {dims} in positive integers")
    return Shape(**dict(zip(letters, map(int, sizes), strict=True)))


def writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(
    argv, doc: str, dims: str, default_shapes: dict, backends: list[str], peers: list[str],
    more: Callable | None = None,
):  # fmt: skip
    """The options of a script; more(parser) adds options. Invalid ones exit with code 2."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known):
        def convert(text):
            chosen = text.split(",")
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
            return chosen

        return convert

    def shapes(text):
        try:
            return [parse_shape(one, dims) for one in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    example = default_shapes["cpu"].split(",")[0]
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if present")
    parser.add_argument(
        "--shapes", type=shapes, metavar=f"{dims},...", help=f"sizes joined by x, e.g. {example}"
    )
    parser.add_argument(
        "--dtype", type=names(DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--backends", type=names(backends), help="default: all")
    parser.add_argument("--peers", type=names([*peers, "none"]), help="default: all")
    parser.add_argument(
        "--without", type=names([*backends, *peers]), action="extend", default=[],
        help="leave these out",
    )  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the results here")
    parser.add_argument("--plot", type=writable, metavar="PNG", help="draw the results here")
    parser.add_argument("--quick", action="store_true", help="first shape only, few repetitions")
    parser.add_argument(
        "--seconds", type=positive, metavar="S", help="start nothing new after S seconds"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue after the results in the --json file"
    )
    parser.add_argument(
        "--compile-only", action="store_true",
        help="compile the contenders into the compilers' caches, and time nothing",
    )  # fmt: skip
    if more:
        more(parser)
    options = parser.parse_args(argv)
    if options.resume and not options.json:
        parser.error("--resume needs --json, the file to continue")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: an interpreted kernel has no speed to measure")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if (
        options.device != "cpu"
        and torch.cuda.is_available()
        and not importlib.util.find_spec("triton")
    ):
        parser.error("triton is not installed; a GPU is timed with triton.testing")
    options.device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    kind = options.device.type
    if options.shapes is None:
        options.shapes = shapes(default_shapes[kind])
        options.shapes = options.shapes[: 1 if options.quick else None]
    options.dtype = options.dtype or ["float32" if kind == "cpu" else "bfloat16"]
    return options
