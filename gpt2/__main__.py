"""python -m gpt2 is the command gpt2."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
