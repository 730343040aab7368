"""What went wrong in the user's terms: the command line prints such an error as one line, without a traceback."""


class UserError(Exception):
    """Names the thing that is wrong and what to do about it."""
