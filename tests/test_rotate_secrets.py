"""Rotation of secrets: a run changes only the planned secrets, and the next run completes an interrupted one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from hypothesis import given
from hypothesis import strategies as st
from programs import loaded

rotation = loaded(ROOT / "playbooks/plugins/filter/rotation.py")
SECRETS: dict[str, Any] = yaml.safe_load((ROOT / "playbooks/vars/secrets.yml").read_text())["rotation_secrets"]
FILES = {"munge.key": 0.0, "mlflow_user_alice": 0.0, "mlflow_user_serving": 86400.0, "serving_api_key": 0.0}


def plan(rotate: object = "", finish: object = "", **more: float) -> dict[str, Any]:
    """Returns the plan for a few secrets, ten days after the first was generated."""
    found: dict[str, Any] = rotation.rotation(SECRETS, FILES | more, rotate, finish, 864000.0)
    return found


def test_every_generated_secret_can_be_rotated() -> None:
    sources = [*(ROOT / "playbooks").glob("*.yml"), *(ROOT / "roles").glob("*/*/*.yml")]
    text = "\n".join(path.read_text() for path in sources)
    page = (ROOT / "docs/security.md").read_text()
    assert [name for name in SECRETS if f"`{name}`" not in page] == [], "document every secret in docs/security.md"
    generated = {
        name.removesuffix(".previous") for name in re.findall(r"(?:/secrets|_secrets ~ ')/([a-z0-9_.]+)", text)
    }
    # Secrets of K3s, whose commands are in docs/security.md.
    generated -= {"k3s_token", "k3s_agent_token"}
    assert {"munge.key", "serving_api_key", "mlflow_admin_password"} <= generated
    patterns = "|".join(secret["files"] for secret in SECRETS.values())
    assert [name for name in generated if not re.fullmatch(patterns, name)] == []


def test_what_a_secret_needs_exists() -> None:
    for name, secret in SECRETS.items():
        assert secret["playbooks"], name
        assert all((ROOT / "playbooks" / f"{playbook}.yml").exists() for playbook in secret["playbooks"]), name
    text = (ROOT / "playbooks/rotate-secrets.yml").read_text()
    for name in (name for name, secret in SECRETS.items() if secret.get("overlap")):
        assert re.search(rf"^          {name}: .*\n?.*", text, re.M), f"{name}: completion is not described"
    assert set(re.findall(r"'(\w+)' \| rotated_playbook", text)) == {
        playbook for secret in SECRETS.values() for playbook in secret["playbooks"]
    }


def test_without_a_choice_secrets_are_listed_and_nothing_is_planned() -> None:
    made = plan()
    assert (made["problems"], made["secrets"], made["generate"]) == ([], [], [])
    assert len(made["report"]) == len(SECRETS)
    (munge,) = [line for line in made["report"] if line.startswith("munge:")]
    assert "10 days old" in munge
    assert SECRETS["munge"]["cost"] in munge
    assert "web_salt: not generated yet" in made["report"]


@pytest.mark.parametrize(
    ("rotate", "finish", "message"),
    [
        ("nonsense", "", "nonsense is not a secret"),
        ("web_salt", "", "web_salt is not generated yet"),
        ("", "munge", "munge has no overlap to finish"),
        ("", "all", "all has no overlap to finish"),
        ("serving_api_key", "serving_api_key", "cannot be rotated and finished in one run"),
        ("serving_api_key.previous", "", "is not a secret"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_by_name(rotate: str, finish: str, message: str) -> None:
    made = plan(rotate, finish, **{"serving_api_key.previous": 0.0})
    assert [problem for problem in made["problems"] if message in problem]
    assert (made["secrets"], made["generate"], made["drop"]) == ([], [], {"first": [], "last": []})


@pytest.mark.parametrize("rotate", ["munge,mlflow_users", "munge mlflow_users", ["munge", "mlflow_users"]])
def test_a_choice_is_a_list_or_text(rotate: object) -> None:
    made = plan(rotate)
    assert made["secrets"] == ["munge", "mlflow_users"]
    assert [one["file"] for one in made["generate"]] == ["munge.key", "mlflow_user_alice", "mlflow_user_serving"]
    assert made["generate"][0]["length"] == 128


def test_a_secret_that_a_run_has_changed_is_not_changed_again() -> None:
    made = plan("munge", **{"munge.key.previous": 0.0})
    assert made["generate"] == []
    assert made["drop"] == {"first": [], "last": ["munge.key.previous"]}
    assert [one["file"] for one in plan("munge", **{"munge.key.previous": 0.0, "munge.key.next": 0.0})["generate"]] == [
        "munge.key"
    ], "the previous secret is kept, and the next one is not used yet"


def test_an_overlap_lasts_until_it_is_finished() -> None:
    made = plan("serving_api_key")
    assert made["overlapping"] == ["serving_api_key"]
    assert made["drop"] == {"first": [], "last": []}
    made = plan(finish="serving_api_key", **{"serving_api_key.previous": 0.0})
    assert made["generate"] == []
    assert made["drop"] == {"first": ["serving_api_key.previous"], "last": []}


def test_all_means_what_was_generated() -> None:
    assert plan("all")["secrets"] == ["munge", "mlflow_users", "serving_api_key"]
    assert plan("all", "serving_api_key")["secrets"] == ["munge", "mlflow_users", "serving_api_key"]


NAMES = st.sampled_from([*SECRETS, "all", "nonsense", ""]) | st.text(max_size=20)


@given(
    rotate=NAMES | st.lists(NAMES) | st.none() | st.integers(), finish=NAMES, kept=st.sets(st.sampled_from([*FILES]))
)
def test_no_choice_is_a_traceback_or_takes_a_secret_that_was_not_chosen(
    rotate: object, finish: str, kept: set[str]
) -> None:
    made = plan(rotate, finish, **{f"{file}.previous": 0.0 for file in kept})
    chosen = {*rotation.names(rotate), *rotation.names(finish)}
    assert {*made["secrets"]} <= ({*SECRETS} if "all" in chosen else chosen)
    if made["problems"]:
        assert (made["secrets"], made["generate"]) == ([], [])


class Site:
    """A control host with secrets, and the hosts of a test."""

    def __init__(self, folder: Path) -> None:
        self.secrets, self.inventory = folder / "secrets", folder / "inventory.yml"
        self.secrets.mkdir()
        self.hosts: dict[str, Any] = {}
        self.groups: dict[str, Any] = {}
        self.write("munge.key", "old")
        self.environment = {**os.environ, "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder / "facts")}

    def write(self, name: str, text: str) -> None:
        """Writes a secret."""
        (self.secrets / name).write_text(f"{text}\n")

    def read(self) -> dict[str, str]:
        """Returns the secrets."""
        return {path.name: path.read_text().strip() for path in self.secrets.iterdir()}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the playbook."""
        variables = {
            "ictx_cluster_name": "test",
            "ictx_state_dir": str(self.secrets.parent),
            "ictx_registry": "192.0.2.1",
        }
        groups = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())["groups"]
        everything = {"hosts": self.hosts, "vars": variables, "children": {name: {} for name in groups} | self.groups}
        self.inventory.write_text(yaml.safe_dump({"all": everything}))
        command = [ROOT / ".venv/bin/ansible-playbook", "--inventory", self.inventory, "playbooks/rotate-secrets.yml"]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, cwd=ROOT, env=self.environment, check=False
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Returns a control host without other hosts."""
    return Site(tmp_path)


def test_a_run_replaces_the_secret_and_prints_none(site: Site) -> None:
    done = site("-e", "rotate=munge", "--diff", "-vvv")
    assert done.returncode == 0, done.stdout
    assert site.read().keys() == {"munge.key"}
    new = site.read()["munge.key"]
    assert re.fullmatch("[A-Za-z0-9]{128}", new)
    assert new not in done.stdout + done.stderr
    assert (site.secrets / "munge.key").stat().st_mode & 0o777 == 0o600


def test_a_host_that_cannot_be_reached_keeps_every_secret_as_it_is(site: Site) -> None:
    site.hosts = {
        "gone": {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_ssh_retries": 0},
        "here": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable},
    }
    done = site("-e", "rotate=munge")
    assert done.returncode != 0
    assert "gone is unreachable: nothing was changed" in done.stdout
    assert site.read() == {"munge.key": "old"}


def test_a_playbook_that_fails_leaves_the_previous_secret_and_the_next_run_completes_it(site: Site) -> None:
    site.write("slurmdbd_password", "old")
    # The role rejects this before it changes anything on the host.
    database = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "slurmdbd_innodb_buffer_pool_mb": "much",
    }
    site.groups = {"slurm_database": {"hosts": {"database": database}}}
    done = site("-e", "rotate=slurmdbd_password")
    assert done.returncode != 0
    assert "slurmdbd_innodb_buffer_pool_mb" in done.stdout
    left = site.read()
    assert left["slurmdbd_password.previous"] == "old"
    assert "a rotation is in progress: complete it with -e rotate=slurmdbd_password" in site().stdout.replace(
        "\n        ", " "
    )
    site.groups = {}
    assert site("-e", "rotate=slurmdbd_password").returncode == 0
    assert site.read() == {"munge.key": "old", "slurmdbd_password": left["slurmdbd_password"]}


@pytest.mark.full
@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"munge.key": "old", "munge.key.next": "new"}, "new"),
        ({"munge.key": "old", "munge.key.previous": "old", "munge.key.next": "new"}, "new"),
        ({"munge.key": "new", "munge.key.previous": "old"}, "new"),
    ],
)
def test_a_run_that_was_cut_off_is_completed_with_the_secret_that_it_made(
    site: Site, left: dict[str, str], expected: str
) -> None:
    for name, text in left.items():
        site.write(name, text)
    done = site("-e", "rotate=munge")
    assert done.returncode == 0, done.stdout
    assert site.read() == {"munge.key": expected}


@pytest.mark.full
@pytest.mark.parametrize("arguments", [[], ["-e", "rotate=munge", "--check"], ["-e", "rotate=nonsense"]])
def test_a_list_a_check_and_a_mistake_change_nothing(site: Site, arguments: list[str]) -> None:
    done = site(*arguments)
    assert (done.returncode == 0) == ("rotate=nonsense" not in arguments)
    assert ("changed=0" not in done.stdout) == ("--check" in arguments)
    assert site.read() == {"munge.key": "old"}


@pytest.mark.full
def test_the_authority_is_trusted_before_it_issues_and_dropped_after(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = site.secrets.parent / "ca"

    def subjects() -> tuple[str, list[str]]:
        """Returns digests of the public keys of the issuing authority, and of the trusted authorities."""
        issues = subprocess.run(
            ["openssl", "pkey", "-in", folder / "ca.key", "-pubout"], capture_output=True, text=True, check=True
        ).stdout
        bundle = re.findall(r"-----BEGIN.*?-----END CERTIFICATE-----\n", (folder / "ca.crt").read_text(), re.S)
        trusted = [
            subprocess.run(
                ["openssl", "x509", "-pubkey", "-noout"], input=one, capture_output=True, text=True, check=True
            ).stdout
            for one in bundle
        ]
        return issues, trusted

    rotate, finish = ["-e", "rotate=authority"], ["-e", "finish=authority"]
    folder.mkdir()
    openssl = ["openssl", "ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", folder / "ca.key"]
    subprocess.run(openssl, check=True)
    first = subprocess.run(
        ["openssl", "pkey", "-in", folder / "ca.key", "-pubout"], capture_output=True, text=True, check=True
    ).stdout
    assert site(*finish).returncode == 0, "there is nothing to finish"
    assert subjects() == (first, [first])
    for repeated in range(2):
        done = site(*rotate)
        assert done.returncode == 0, done.stdout
        if repeated == 0:
            issues, trusted = subjects()
            assert issues == first
            assert len(trusted) == 2
            second = trusted[1]
            assert second != first
            assert site(*finish).returncode == 2, "the new authority does not issue yet"
            # An interrupted run is completed before the next step.
            (folder / "next/trusted").unlink()
            assert site(*rotate).returncode == 0
            assert subjects() == (first, [first, second])
    assert subjects() == (second, [second, first])
    assert site(*finish).returncode == 0
    assert subjects() == (second, [second])
