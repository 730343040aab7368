"""torchrun with the exit status of the failed rank."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command as two ranks."""
    options = ["--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, "-m", "ictx.train.launch", *options, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", 0),
        # The other rank waits for the failed one, and gets SIGTERM.
        ("if [ $RANK = 1 ]; then exit 2; fi; exec sleep 60", 2),
        # torchrun replaces $$ with $.
        ("if [ $RANK = 0 ]; then kill -KILL $$$$; fi; exec sleep 60", 128 + signal.SIGKILL),
    ],
)
def test_the_status_is_that_of_the_first_rank_that_failed(command: str, status: int) -> None:
    done = launched("sh", "-c", command)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_options_are_torchruns() -> None:
    done = launched("--no-such-option")
    assert done.returncode == 2
