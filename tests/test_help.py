"""Every program in scripts/ has a help text with an example, and prints it before any other action."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").iterdir() if os.access(path, os.X_OK))
Run = Callable[[str, str], subprocess.CompletedProcess[str]]
WITHOUT_ARGUMENTS = ["down", "lab", "lint", "pipeline", "typecheck"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script in a folder without playbooks and inventory, where ignoring its arguments does no harm."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for room in ("docs", "roles", "tests"):
        (tmp_path / room).symlink_to(ROOT / room)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ICTX_LAB_STATE", str(tmp_path / "lab"))
    monkeypatch.setenv("ICTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")

    def done(script: str, word: str) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "scripts" / script, word]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_a_help_with_an_example(script: str, run: Run) -> None:
    help = run(script, "--help")
    assert (help.returncode, help.stderr) == (0, "")
    assert "usage: " in help.stdout
    assert "example" in help.stdout


@pytest.mark.parametrize("script", WITHOUT_ARGUMENTS)
def test_a_script_refuses_what_it_does_not_take(script: str, run: Run) -> None:
    refused = run(script, "--dry-run")
    assert refused.returncode in (1, 2)
    assert f"scripts/{script}" in refused.stdout + refused.stderr
