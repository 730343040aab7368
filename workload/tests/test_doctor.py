"""`ictx doctor` reports each problem of a machine with its remedy, and sets the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ictx.doctor import checks
from ictx.doctor.checks import Level


def doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, without a tracking server by default."""
    return subprocess.run(
        [sys.executable, "-m", "ictx", "doctor", *words],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_machine_without_a_gpu_can_train(tmp_path: Path) -> None:
    done = doctor("--dir", str(tmp_path), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(one["check"], one["level"]): one["text"] for one in json.loads(done.stdout)}
    assert "no NVIDIA GPU" in found["gpus", "note"]
    assert "mla_attention torch" in found["kernels", "ok"]
    assert str(tmp_path) in " ".join(found.values())


def test_a_server_that_is_down_and_a_folder_that_is_missing_are_named(tmp_path: Path) -> None:
    done = doctor("--dir", str(tmp_path / "none"), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(lines) == 2
    assert "connection refused" in lines[0]
    assert f"{tmp_path / 'none'} is not a folder" in lines[1]
    assert done.stdout.count("→") >= 2, "each problem has a remedy"


def test_a_driver_that_pytorch_does_not_use_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of nvidia-smi simulates a driver; the tests' PyTorch is built for CPUs."""
    program = tmp_path / "nvidia-smi"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = checks.gpus()
    assert found.level is Level.FAIL
    assert "is a CPU build" in found.remedy


def test_little_space_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = checks.storage(tmp_path)
    monkeypatch.setattr(checks, "LEAST_GB", 10**9)
    (noted,) = checks.storage(tmp_path)
    assert found.level is not Level.FAIL
    assert noted.level is Level.NOTE
