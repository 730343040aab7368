"""What the end-to-end tests share."""

from __future__ import annotations

import pytest
from lab import STATE, Lab


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab that `make lab` left running."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()
