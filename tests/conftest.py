"""What the platform's tests share. Ansible reads its settings when it is first imported, so they are made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

os.environ |= {
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    # The facts of the lab's nodes stay what they are.
    "ANSIBLE_CACHE_PLUGIN": "memory",
    "ANSIBLE_NOCOLOR": "1",
}

# The quick suite draws the same examples each time; the full suite draws many new ones.
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("ICTX_SUITE", "quick"))


@pytest.fixture(scope="session")
def root() -> Path:
    """Returns the folder of the repository."""
    return ROOT
