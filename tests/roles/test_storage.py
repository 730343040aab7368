"""The shared directory that something else mounts."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import play


@pytest.mark.parametrize("trailing", ["", "/"])
def test_any_mount_counts_and_a_plain_folder_does_not(tmp_path: Path, trailing: str) -> None:
    role = {"include_role": {"name": "storage", "tasks_from": "preflight"}}
    variables = {"storage_type": "external", "storage_allow_suid": True}
    # No file system with a device behind it, and none that facts list.
    done = play(tmp_path, [role], {**variables, "storage_shared_dir": f"/proc{trailing}"})
    assert done.returncode == 0, done.stdout + done.stderr
    done = play(tmp_path, [role], {**variables, "storage_shared_dir": f"{tmp_path}{trailing}"})
    assert done.returncode != 0
    assert f"nothing is mounted at {tmp_path}" in " ".join((done.stdout + done.stderr).split())
