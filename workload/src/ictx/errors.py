"""Errors for users: the command line prints them as one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """An error with a message that contains the cause and the remedy."""


def printable(text: str) -> str:
    """Returns text with non-printable characters escaped: names from others may contain terminal control sequences."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def exit_status(command: Callable[[], int]) -> int:
    """Returns the command's status. Prints a UserError, or an OSError of a file, as one line and returns 2."""
    try:
        return command()
    except UserError as error:
        print(f"ictx: {printable(str(error))}", file=sys.stderr)
    except OSError as error:
        # A file that is missing, not permitted, …: a traceback would not help the user.
        if error.filename is None:
            raise
        print(f"ictx: {printable(str(error.filename))}: {error.strerror}", file=sys.stderr)
    return 2
