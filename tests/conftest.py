"""Fixtures of the platform's tests. Ansible reads its settings on its first import, so they are set here."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import recovery
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

os.environ |= {
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    # Do not change the cached facts of the lab's nodes.
    "ANSIBLE_CACHE_PLUGIN": "memory",
    "ANSIBLE_NOCOLOR": "1",
}

# The quick suite generates the same examples each time; the full suite generates many new ones.
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("full" if os.environ.get("ICTX_SUITE") == "full" else "quick")


@pytest.fixture(scope="session")
def root() -> Path:
    """Returns the folder of the repository."""
    return ROOT


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> recovery.Drill:
    """Measures the recovery times of a drill, which are recorded with its marker."""
    return request.node.stash.setdefault(DRILL, recovery.Drill())


DRILL = pytest.StashKey[recovery.Drill]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Records a drill that ran or whose fixtures failed."""
    report = yield
    faults = [mark.args[0] for mark in item.iter_markers("drill")]
    if faults and (report.when == "call" or report.failed) and not report.skipped:
        seconds = item.stash[DRILL].seconds if DRILL in item.stash else []
        recovery.record(recovery.RECORDS, faults, report.passed, seconds)
    return report
