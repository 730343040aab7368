"""`python -m ictx.train.launch`: torchrun with the status of the first rank that failed, where its own is always 1."""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Starts ranks with torchrun's arguments; returns 0, a rank's status, or 128 and the number of what killed it."""
    try:
        run.main()
    except ChildFailedError as error:
        # Its report is in the log already.
        status = error.get_first_failure()[1].exitcode
        return int(status if status > 0 else 128 - status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
