"""What the end-to-end tests share."""

from __future__ import annotations

import os

import pytest
from lab import STATE, Lab

# The lab's network is known to the program that made it, and podman's own default may be another one.
os.environ.setdefault("CONTAINERS_CONF", str(STATE / "containers.conf"))


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab that `make lab` left running."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()
