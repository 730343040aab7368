"""The key of an apt repository is trusted by its fingerprint, not on first use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.plugins.filter.core import regex_findall
from cluster import ROOT
from programs import play

VARS: dict[str, Any] = yaml.safe_load((ROOT / "roles/apt_key/vars/main.yml").read_text())
M9 = pytest.mark.attack(
    "M9",
    "An attacker who controls a package repository publishes another key",
    before="trusted on first use",
    now="rejected: the fingerprint differs from the role's defaults; the message names both",
)
needs_gpg = pytest.mark.skipif(
    not shutil.which("gpg"), reason="the control host has no gpg; nodes get it from the role"
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns the files of two keys, each with a subkey."""
    made = []
    for name in ("vendor", "mallory"):
        home = tmp_path_factory.mktemp(name)
        home.chmod(0o700)
        environment = {**os.environ, "GNUPGHOME": str(home)}
        gpg = ["gpg", "--batch", "--quiet", "--passphrase", ""]
        subprocess.run([*gpg, "--quick-generate-key", f"{name} <{name}@example.org>"], env=environment, check=True)
        exported = subprocess.run(["gpg", "--armor", "--export"], env=environment, check=True, capture_output=True)
        (home / "key.asc").write_bytes(exported.stdout)
        made.append(home / "key.asc")
        subprocess.run(["gpgconf", "--kill", "all"], env=environment, check=False)
    return made[0], made[1]


def fingerprints(file: Path) -> list[str]:
    """Returns the fingerprints that the role reads from a file."""
    # gpg fails without its home folder, which the role creates on nodes.
    with tempfile.TemporaryDirectory() as home:
        command = VARS["_apt_key_show"].replace("{{ _apt_key_folder.path }}", home)
        assert f"--homedir {home} " in command
        done = subprocess.run([*command.split(), str(file)], capture_output=True, text=True, check=False)
    return regex_findall(done.stdout, VARS["_apt_key_primary"])


@needs_gpg
def test_only_primary_keys_count(keys: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = (fingerprints(file) for file in keys)
    assert len(one) == len(two) == 1
    assert one != two
    (tmp_path / "both.asc").write_bytes(keys[0].read_bytes() + keys[1].read_bytes())
    assert sorted(fingerprints(tmp_path / "both.asc")) == sorted(one + two)
    (tmp_path / "none.asc").write_text("<html>")
    assert fingerprints(tmp_path / "none.asc") == []


@M9
@needs_gpg
@pytest.mark.full
def test_another_key_is_refused_with_both_fingerprints(keys: tuple[Path, Path], tmp_path: Path) -> None:
    tasks = yaml.safe_load((ROOT / "roles/apt_key/tasks/main.yml").read_text())[1:]
    text = yaml.safe_dump(tasks).replace("/etc/apt/keyrings", str(tmp_path / "keyrings"))
    expected = fingerprints(keys[0])

    def install(file: Path) -> subprocess.CompletedProcess[str]:
        variables = {**VARS, "apt_key_fingerprints": expected, "apt_key_name": "x", "apt_key_url": f"file://{file}"}
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": variables}
        play |= {"tasks": yaml.safe_load(text.replace("_apt_key_reader is changed", "false"))}
        (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
        command = ["ansible-playbook", "--inventory=nobody,", str(tmp_path / "play.yml")]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    installed = tmp_path / "keyrings/x.asc"
    done = install(keys[1])
    assert done.returncode != 0
    output = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert fingerprints(keys[1])[0] in output
    assert expected[0] in output
    assert not installed.exists()

    assert install(keys[0]).returncode == 0
    assert fingerprints(installed) == expected
    assert "changed=0" in install(keys[0]).stdout
    # A key that somebody replaced is restored, and never replaced with another.
    installed.write_bytes(keys[1].read_bytes())
    assert install(keys[1]).returncode != 0
    assert install(keys[0]).returncode == 0
    assert fingerprints(installed) == expected


@M9
def test_every_repository_that_a_role_adds_has_a_verified_key() -> None:
    added = 0
    for file in ROOT.glob("roles/*/tasks/*.yml"):
        for task in yaml.safe_load(file.read_text()):
            if repository := task.get("ansible.builtin.deb822_repository"):
                added += 1
                assert repository["signed_by"].startswith(("/etc/apt/keyrings/", "/usr/share/keyrings/debian-"))
                assert "apt_key" in file.read_text() or "debian-" in repository["signed_by"]
        assert "signed_by: http" not in file.read_text()
    assert added >= 4


@pytest.mark.parametrize("check", [True, False])
def test_a_dry_run_on_a_new_machine_reports_its_repositories_as_changes(tmp_path: Path, check: bool) -> None:
    found = [
        task
        for file in sorted(ROOT.glob("roles/*/tasks/*.yml"))
        for task in yaml.safe_load(file.read_text())
        if "ansible.builtin.deb822_repository" in task
    ]
    assert len(found) >= 4
    for task in found:
        # As without python3-debian, which a dry run does not install.
        failing = {"name": task["name"], "fail": {"msg": "Failed to import python3-debian"}}
        keys = [key for key in ("register", "changed_when", "failed_when") if key in task]
        failing |= {key: task[key].replace("ansible_check_mode", str(check)) for key in keys}
        done = play(tmp_path, [failing], {})
        assert (done.returncode == 0) == check, f"{task['name']}: {done.stdout}"
        assert ("changed=1" in done.stdout) == check, task["name"]
