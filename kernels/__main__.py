"""python -m gpt2.kernels: which backend serves each op here, and why the others do not.

python -m gpt2.kernels build [--cuda] [--out DIR] [--force]: compiles csrc ahead of its first use.
"""

import argparse
import sys
import time
from pathlib import Path

from . import _cache, native, report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpt2.kernels",
        description="Which backend serves each op on this machine, and why the others do not.",
    )
    commands = parser.add_subparsers(dest="command")
    build = commands.add_parser("build", help="compile the CPU kernels ahead of their first use")
    build.add_argument("--cuda", action="store_true", help="the CUDA kernels instead")
    build.add_argument("--out", type=Path, metavar="DIR", help="copy the library to this folder")
    build.add_argument("--force", action="store_true", help="compile even if that has been done")
    options = parser.parse_args()
    if options.command is None:
        print(report())
        return 0
    start = time.perf_counter()
    try:
        library = native.build(
            "cuda" if options.cuda else "cpu", out=options.out, force=options.force
        )
    except native.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{_cache.one_line(library)} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
