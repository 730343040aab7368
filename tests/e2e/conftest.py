"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import STATE, Lab, wait_for
from serving import Client

# `make lab` selects podman's network back end in this file; podman's default may be another one.
os.environ.setdefault("CONTAINERS_CONF", str(STATE / "containers.conf"))


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The running lab that `make lab` provisioned."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()


@pytest.fixture
def steady() -> Iterator[Client]:
    """A client that sends requests to the served model while a test runs."""
    with Client() as client:
        yield client


@pytest.fixture(autouse=True)
def no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancels the jobs that a failed drill left in the queue, before the next drill starts."""
    yield
    if request.node.get_closest_marker("drill") and (STATE / "ssh/config").exists():
        # Repeated, since a job is requeued if its node is lost meanwhile.
        cancel = "scancel --user=researcher; squeue --noheader --user=researcher"
        wait_for("an empty queue", lambda: Lab().run("ctl", cancel).stdout == "", 300)
