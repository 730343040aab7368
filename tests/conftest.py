"""What the platform's tests share. Ansible reads its settings when it is first imported, so they are made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ |= {
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    # The facts of the lab's nodes stay what they are.
    "ANSIBLE_CACHE_PLUGIN": "memory",
    "ANSIBLE_NOCOLOR": "1",
}


@pytest.fixture(scope="session")
def root() -> Path:
    """Returns the folder of the repository."""
    return ROOT
