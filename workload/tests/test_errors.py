"""Error output of the command line."""

from __future__ import annotations

import pytest

from ictx.errors import UserError, exit_status


@pytest.mark.attack(
    "H4",
    "a model's or file's name contains line ends and terminal sequences, and appears in a promoter's error",
    before="the sequences controlled the promoter's terminal",
    now="an error is one line of printable text",
)
@pytest.mark.parametrize(
    "error", [UserError("registered are a\n\x1b[2Jb\u202e"), FileNotFoundError(2, "is missing", "a\n\x1b[2J")]
)
def test_an_error_is_one_printable_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise error

    assert exit_status(fails) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert line.startswith("ictx: ")
