"""python -m gpt2.kernels: prints the backend of each op on this machine, and why others are not
available.

python -m gpt2.kernels build [--cuda | --replay] [--out DIR] [--force]: compiles csrc ahead of its
first use.
"""

import argparse
import sys
import time
from pathlib import Path

from . import recording, report
from .native import build_cache, libraries


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2.kernels",
        description="Print the backend of each op on this machine, and why others are unavailable.",
    )
    commands = parser.add_subparsers(dest="command")
    build = commands.add_parser("build", help="compile the CPU kernels ahead of their first use")
    which = build.add_mutually_exclusive_group()
    which.add_argument("--cuda", action="store_true", help="compile the CUDA kernels instead")
    which.add_argument("--replay", action="store_true", help="compile the replay of calls instead")
    build.add_argument("--out", type=Path, metavar="DIR", help="copy the library to this folder")
    build.add_argument("--force", action="store_true", help="compile even if a build exists")
    options = parser.parse_args()
    if options.command is None:
        print(report(), recording.report(), sep="\n\n")
        return 0
    start = time.perf_counter()
    try:
        name = "cuda" if options.cuda else "replay" if options.replay else "cpu"
        library = libraries.build(name, out=options.out, force=options.force)
    except libraries.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{build_cache.one_line(library)} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
