"""`python -m ictx`, which torchrun needs."""

import sys

from ictx.cli import main

if __name__ == "__main__":
    sys.exit(main())
