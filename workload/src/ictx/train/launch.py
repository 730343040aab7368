"""`python -m ictx.train.launch`: torchrun, but with the exit status of the first rank that failed instead of 1."""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Starts ranks with torchrun's arguments; returns 0, a rank's exit status, or 128 plus the signal's number."""
    try:
        run.main()
    except ChildFailedError as error:
        # torchrun has already logged its report.
        status = error.get_first_failure()[1].exitcode
        return int(status if status > 0 else 128 - status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
