"""What went wrong in the user's terms: the command line prints such an error as one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Names the thing that is wrong and what to do about it."""


def printable(text: str) -> str:
    """Returns text in one line: names of files, models and users are others', and may steer a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def exit_status(command: Callable[[], int]) -> int:
    """Returns the command's status; a UserError becomes one line and status 2."""
    try:
        return command()
    except UserError as error:
        print(f"ictx: {printable(str(error))}", file=sys.stderr)
    except OSError as error:
        # A file that is missing, not permitted, …: the file is what matters, not where we met it.
        if error.filename is None:
            raise
        print(f"ictx: {printable(str(error.filename))}: {error.strerror}", file=sys.stderr)
    return 2
