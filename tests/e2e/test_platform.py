"""The provisioned lab: a second run changes nothing, and errors name their cause."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from lab import ROOT, SHARED, STATE, Lab, wait_for
from programs import loaded

pytestmark = pytest.mark.lab

dashboards = loaded(ROOT / "scripts/dashboards")


def ansible(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ansible-playbook as a user does."""
    command = [ROOT / ".venv/bin/ansible-playbook", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def changes(output: str) -> dict[str, tuple[int, int]]:
    """Returns each host's counts of changed and failed tasks."""
    found = re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+) +unreachable=0 +failed=(\d+)", output, re.MULTILINE)
    return {host: (int(changed), int(failed)) for host, changed, failed in found}


@pytest.mark.parametrize("mode", [[], pytest.param(["--check"], marks=pytest.mark.full)], ids=["run", "check"])
def test_another_run_of_site_changes_nothing(mode: list[str]) -> None:
    done = ansible("site.yml", *mode)
    assert done.returncode == 0, done.stdout[-3000:]
    assert changes(done.stdout) == dict.fromkeys(["ctl", "kube1", "localhost", "n1", "n2", "svc1"], (0, 0)), done.stdout
    assert "not rebuilt" in done.stdout


def test_the_registry_refuses_a_wrong_password(lab: Lab) -> None:
    done = lab.run("ctl", "curl --silent --insecure --user ictx:wrong --write-out '%{http_code}' https://svc1:5000/v2/")
    assert done.stdout.endswith("401")


@pytest.mark.full
def test_a_base_that_does_not_exist_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    before = (SHARED / "images" / "training" / "current").readlink()
    reference = "10.203.77.31:5000/nobody/made-this@sha256:" + 64 * "0"
    extra = tmp_path / "extra.yml"
    extra.write_text(f"image_bake_base: {{image: '{reference}'}}\n")
    done = ansible("playbooks/images.yml", "-e", f"@{extra}")
    assert done.returncode == 2
    assert f"image_bake_base.image {reference} cannot be pulled" in done.stdout + done.stderr
    assert (SHARED / "images" / "training" / "current").readlink() == before


@pytest.mark.full
def test_a_full_shared_directory_is_named() -> None:
    done = ansible("playbooks/preflight.yml", "-e", "ictx_shared_min_free_gb=1000000")
    assert done.returncode != 0
    assert "ictx_shared_min_free_gb" in done.stdout + done.stderr


def test_secrets_are_private() -> None:
    loose = [path for folder in ("secrets", "ca") for path in (STATE / folder).iterdir() if path.suffix != ".crt"]
    assert loose
    assert [path for path in loose if path.stat().st_mode & 0o077] == []


@pytest.mark.full
def test_a_backup_reaches_prometheus(lab: Lab) -> None:
    began = int(time.time())
    done = lab.run("ctl", "systemctl start ictx-backup")
    assert done.returncode == 0, lab.run("ctl", "journalctl --no-pager --unit=ictx-backup --lines=20").stdout
    prometheus = dashboards.Prometheus.of_lab()

    def exposed() -> set[str]:
        found = prometheus.instant(f"ictx_backup_last_success_timestamp_seconds >= {began}")
        return {series["metric"]["what"] for series in found if series["metric"]["node"] == "ctl"}

    wait_for("the backup's metric in Prometheus", lambda: exposed() == {"accounting", "slurm-state"}, seconds=90)
    assert not [path for path in (SHARED / "backup").rglob("*") if path.stat().st_mode & 0o077]
