"""Runs every marked code block of docs/first-hour.md, in order, in a fresh clone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import marked
from lab import ROOT, STATE, Lab
from test_lifecycle import played

pytestmark = [pytest.mark.lab, pytest.mark.full]


@pytest.fixture
def back(lab: Lab) -> Iterator[None]:
    """Serves the lab's own model again afterwards."""
    yield
    if STATE.exists():
        played("playbooks/serving.yml")


def test_the_page_works_as_it_stands(lab: Lab, tmp_path: Path, back: None) -> None:
    """The last block, which removes the lab, runs only with ICTX_TEST_DOWN=1."""
    folder = tmp_path
    # A reader of the page has no active virtual environment.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "ANSIBLE_"))}
    for who, block in marked(ROOT / "docs/first-hour.md"):
        if who == "down" and os.environ.get("ICTX_TEST_DOWN") != "1":
            continue
        text = "set -euo pipefail\n" + block
        if who == "researcher":
            done = lab.run("ctl", text, user=who)
        else:
            text = text.replace("REPOSITORY", str(ROOT)).replace("~/.local/state/ictx/lab", str(STATE))
            shell = ["bash", "-c", text]
            done = subprocess.run(shell, env=clean, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        folder = tmp_path / "infinitecontext"
        if "serving.yml" in block:
            status = subprocess.run([ROOT / "scripts/status"], capture_output=True, text=True, check=False)
            assert "mine, up to" in status.stdout, status.stdout
