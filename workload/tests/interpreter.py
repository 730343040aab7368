"""Runs the cases of a test file that need Triton's interpreter, which a process chooses before it imports a kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ictx.kernels import dispatch


def passes_interpreted(file: str, summary: str, *options: str) -> None:
    """Runs `file` in a process of its own, whose summary must hold `summary`; skips in that process."""
    if dispatch.interpreted():
        pytest.skip("this is that process")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert summary in ended.stdout
