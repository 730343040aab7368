"""Runs the cases of a test file in Triton's interpreter, which must be enabled before a process imports a kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ictx.kernels import dispatch


def passes_interpreted(file: str, summary: str, *options: str) -> None:
    """Runs `file` in a new process, whose output must contain `summary`; skips in that process."""
    if dispatch.interpreted():
        pytest.skip("already in Triton's interpreter")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert summary in ended.stdout
