"""What the end-to-end tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import STATE, Lab, wait_for
from serving import Client

# The lab's network is known to the program that made it, and podman's own default may be another one.
os.environ.setdefault("CONTAINERS_CONF", str(STATE / "containers.conf"))


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab that `make lab` left running."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()


@pytest.fixture
def steady() -> Iterator[Client]:
    """A client that sends requests to the served model while a test runs."""
    with Client() as client:
        yield client


@pytest.fixture(autouse=True)
def no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A drill that failed leaves no job in the queue, which the next one would meet."""
    yield
    if request.node.get_closest_marker("drill") and (STATE / "ssh/config").exists():
        # Again and again: a job whose node is lost meanwhile goes back to the queue.
        cancel = "scancel --user=researcher; squeue --noheader --user=researcher"
        wait_for("an empty queue", lambda: Lab().run("ctl", cancel).stdout == "", 300)
