"""Root writes users' keys to a folder where users cannot create links."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT

ROLE = ROOT / "roles/common"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJUpyrhU3cLNpn7FPVUs7WuyR7XGEIJvbs1JSMUxtr1q"


def converge(folder: Path, users: list[dict[str, Any]]) -> str:
    """Runs the tasks with their files in a folder; returns the output."""
    tasks = yaml.safe_load((ROLE / "tasks/keys.yml").read_text())
    variables = {
        **yaml.safe_load((ROLE / "vars/main.yml").read_text()),
        "common_users": users,
        "_common_keys_dir": str(folder / "keys"),
        "_common_sshd_config": str(folder / "sshd.conf"),
    }
    # sshd, which validates the file, may not be installed.
    (sshd,) = variables["_common_keys_sshd"]
    variables["_common_keys_sshd"] = [{"template": str(ROLE / "templates/sshd.conf.j2"), "dest": sshd["dest"]}]
    handlers = [{"name": "Reload sshd", "ansible.builtin.debug": {"msg": "reloaded"}}]
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": variables}
    (folder / "play.yml").write_text(yaml.safe_dump([{**play, "tasks": tasks, "handlers": handlers}]))
    command = ["ansible-playbook", "--inventory=nobody,", str(folder / "play.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.attack(
    "C1",
    "a user's ~/.ssh, or authorized_keys in it, is a link when the administrator runs site.yml",
    before="root wrote the keys through the link and gave the file to the user: /etc/shadow, or root's own keys",
    now="root writes keys only to a root-owned folder, from which sshd reads them",
)
def test_root_writes_keys_to_a_folder_of_its_own(tmp_path: Path) -> None:
    users = [{"name": "alice", "uid": 2001, "ssh_keys": [KEY, f"{KEY} other"]}, {"name": "bob", "uid": 2002}]
    users += [{"name": "carol", "uid": 2003, "ssh_keys": []}, {"name": "dave", "uid": 2004, "state": "absent"}]
    assert "reloaded" in converge(tmp_path, users)
    assert {file.name: file.read_text() for file in (tmp_path / "keys").iterdir()} == {
        "alice": f"{KEY}\n{KEY} other\n",
        "carol": "",
    }
    _, match, place = (tmp_path / "sshd.conf").read_text().splitlines()
    assert match == "Match User alice,carol"
    assert place.split() == ["AuthorizedKeysFile", f"{tmp_path}/keys/%u"]
    converge(tmp_path, [{**user, "state": "absent" if user["name"] == "alice" else "present"} for user in users[:3]])
    assert [file.name for file in (tmp_path / "keys").iterdir()] == ["carol"], "keys of absent users are removed"
    converge(tmp_path, [{"name": "bob", "uid": 2002}])
    assert not (tmp_path / "sshd.conf").exists()


def test_no_task_works_in_the_home_of_a_user() -> None:
    for file in [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("playbooks/**/*.yml")]:
        text = file.read_text()
        assert "authorized_key:" not in text, file
        assert "/home/" not in text, file
