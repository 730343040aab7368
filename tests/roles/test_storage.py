"""The shared directory, mounted by other means than the role."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from programs import play


@pytest.mark.parametrize("trailing", ["", "/"])
def test_any_mount_counts_and_a_plain_folder_does_not(tmp_path: Path, trailing: str) -> None:
    role = {"include_role": {"name": "storage", "tasks_from": "preflight"}}
    variables = {"storage_type": "external", "storage_allow_suid": True}
    # A file system without a device, which Ansible's facts do not list.
    done = play(tmp_path, [role], {**variables, "storage_shared_dir": f"/proc{trailing}"})
    assert done.returncode == 0, done.stdout + done.stderr
    done = play(tmp_path, [role], {**variables, "storage_shared_dir": f"{tmp_path}{trailing}"})
    assert done.returncode != 0
    assert f"nothing is mounted at {tmp_path}" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(os.getuid() != 0, reason="requires root, to change owners")
def test_only_folders_that_differ_are_changed_and_one_of_somebody_else_is_refused(tmp_path: Path) -> None:
    role = {"include_role": {"name": "storage", "tasks_from": "folders"}}
    variables = {
        "_storage_root": str(tmp_path / "shared"),
        "storage_folders": [{"path": ".", "mode": "0755"}, {"path": "runs", "mode": "0755"}],
        "storage_users": ["daemon", "games"],
        "storage_user_folders": [{"path": "runs", "mode": "2750", "group": "bin"}],
    }

    def changed() -> set[str]:
        done = play(tmp_path, [role], variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return set(re.findall(r"changed: .*=>.*item=\S*/runs/(\w+)\)", done.stdout))

    assert changed() == {"daemon", "games"}
    folder = tmp_path / "shared/runs/games"
    assert (folder.owner(), folder.group(), folder.stat().st_mode & 0o7777) == ("games", "bin", 0o2750)
    assert changed() == set()
    folder.chmod(0o2751)
    assert changed() == {"games"}
    shutil.chown(tmp_path / "shared/runs/daemon", group="games")
    assert changed() == {"daemon"}
    assert changed() == set()

    for somebody in ("a folder", "a link"):
        folder.rmdir()
        if somebody == "a folder":
            folder.mkdir()
            shutil.chown(folder, "mail")
        else:
            folder.symlink_to(tmp_path)
        done = play(tmp_path, [role], variables)
        assert done.returncode != 0, somebody
        assert f"{folder} is not a folder of games: another user created it" in " ".join(done.stdout.split())
