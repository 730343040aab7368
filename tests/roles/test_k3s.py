"""Selection of the Kubernetes distribution, and clusters that the role k3s rejects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from programs import play

VERSION = yaml.safe_load((ROOT / "roles/k3s/defaults/main.yml").read_text())["k3s_version"]
NOWHERE = "http://127.0.0.1:1/k3s"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without logging."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Suppresses the log of requests."""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves a mirror with the release's list of checksums; yields its address."""
    folder = tmp_path_factory.mktemp("mirror")
    (folder / VERSION).mkdir()
    (folder / VERSION / "sha256sum-amd64.txt").write_text("")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def choose(folder: Path, wanted: str, mirror: str, *, lab: bool, **variables: str) -> tuple[bool, str]:
    """Returns whether a distribution was selected, and the output."""
    given = {
        "_kubernetes_wanted": wanted,
        "_kubernetes_is_lab": lab,
        "ictx_cache_dir": str(folder / "cache"),
        "k3s_mirror": mirror,
        **variables,
    }
    done = play(folder, [{"import_tasks": str(ROOT / "playbooks/tasks/choose_kubernetes.yml")}], given)
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("wanted", ["auto", "k3s"])
def test_k3s_is_chosen_where_it_can_be_fetched(tmp_path: Path, mirror: str, wanted: str) -> None:
    done, said = choose(tmp_path, wanted, mirror, lab=True)
    assert done, said
    assert f"Kubernetes: K3s, because kubernetes_distribution is {wanted} and {mirror}" in said


def test_a_lab_that_cannot_fetch_k3s_reports_it_and_takes_debians_sources(tmp_path: Path) -> None:
    done, said = choose(tmp_path, "auto", NOWHERE, lab=True)
    assert done, said
    assert f"K3s {VERSION} cannot be downloaded from {NOWHERE}" in said
    assert "Debian''s sources (lab only)" in said


@pytest.mark.parametrize(("wanted", "lab"), [("auto", False), ("k3s", True)])
def test_elsewhere_it_is_an_error_that_names_the_release_the_address_and_the_remedy(
    tmp_path: Path, wanted: str, lab: bool
) -> None:
    done, said = choose(tmp_path, wanted, NOWHERE, lab=lab)
    assert not done
    assert f"K3s {VERSION} cannot be downloaded from {NOWHERE}" in said
    assert "Set k3s_mirror to a mirror of its releases, or k3s_airgap_dir" in said


def test_a_folder_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "k3s").write_text("")
    done, said = choose(tmp_path, "k3s", NOWHERE, lab=False, k3s_airgap_dir=str(tmp_path))
    assert not done
    assert f"lacks k3s-airgap-images-amd64.tar.zst in k3s_airgap_dir {tmp_path}" in said


def test_the_lab_takes_debians_sources_when_configured_and_queries_nothing(tmp_path: Path, mirror: str) -> None:
    done, said = choose(tmp_path, "debian", mirror, lab=True)
    assert done, said
    assert "sources (lab only), because kubernetes_distribution is debian" in said
    assert "Query the mirror" not in said


def test_an_even_number_of_servers_is_refused(tmp_path: Path) -> None:
    variables = {
        "ansible_facts": {"architecture": "x86_64"},
        "k3s_role": "server",
        "k3s_servers": ["localhost", "other"],
    }
    role = {"include_role": {"name": "k3s", "tasks_from": "preflight"}}
    done = play(tmp_path, [role], variables)
    assert done.returncode != 0
    assert (
        "2 servers (localhost, other): an even number tolerates no more failures than one server less"
        in done.stdout + done.stderr
    )


def test_a_release_without_checksums_is_refused(tmp_path: Path) -> None:
    variables = {
        "ansible_facts": {"architecture": "x86_64"},
        "k3s_role": "server",
        "k3s_servers": ["localhost"],
        "k3s_version": "v9.9.9+k3s1",
    }
    done = play(tmp_path, [{"include_role": {"name": "k3s", "tasks_from": "preflight"}}], variables)
    assert done.returncode != 0
    assert "k3s_checksums has no checksums of K3s v9.9.9+k3s1" in " ".join((done.stdout + done.stderr).split())


def test_a_node_does_not_get_both_roles(tmp_path: Path) -> None:
    (tmp_path / "server/db").mkdir(parents=True)
    (tmp_path / "k3s-agent.service").write_text("")
    own = {"_k3s_data": str(tmp_path), "_k3s_other_unit": f"{tmp_path}/k3s-agent.service"}
    variables = {
        "ansible_facts": {"architecture": "x86_64"},
        "k3s_role": "server",
        "k3s_servers": ["localhost"],
    }
    done = play(tmp_path, [{"include_role": {"name": "k3s", "tasks_from": "preflight"}, "vars": own}], variables)
    assert done.returncode != 0
    assert "localhost is to be a server, but has " in (text := " ".join(done.stdout.split()))
    assert "run playbooks/remove-k3s-node.yml, and add it to the other group" in text


def first_server(tmp_path: Path, have: list[str], *others: dict[str, Any]) -> tuple[int, str]:
    """Returns status and output of preflight on the first of three servers, some of which already have a cluster."""
    for name in have:
        (tmp_path / name / "server/db").mkdir(parents=True)
    role = {
        "include_role": {"name": "k3s", "tasks_from": "preflight"},
        "vars": {"_k3s_data": f"{tmp_path}/{{{{ item }}}}"},
    }
    variables = {
        "ansible_facts": {"architecture": "x86_64"},
        "k3s_role": "server",
        "k3s_servers": ["localhost", "b", "c"],
    }
    done = play(tmp_path, [*({"add_host": host} for host in others), role], variables)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("have", [[], ["b"]])
def test_no_cluster_is_started_while_a_server_that_may_have_one_cannot_be_reached(
    tmp_path: Path, have: list[str]
) -> None:
    away = {"name": "c", "ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    status, text = first_server(tmp_path, have, {"name": "b", "ansible_connection": "local"}, away)
    assert ("has no cluster, and c cannot be reached" in text) == (not have), text
    assert (status != 0) == (not have), text


def test_a_first_server_has_no_other_to_compare_with(tmp_path: Path) -> None:
    tasks = yaml.safe_load((ROOT / "roles/k3s/tasks/install.yml").read_text())[:2]
    variables = {"_k3s_is_server": True, "_k3s_others": [], "_k3s_first": "localhost", "k3s_version": "v1.34.2+k3s1"}
    done = play(tmp_path, tasks, variables)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("wanted", "allowed"), [("v1.34.1+k3s1", True), ("v1.34.2+k3s1", True), ("v1.35.1+k3s1", False)]
)
def test_an_agent_is_never_newer_than_its_servers(tmp_path: Path, wanted: str, allowed: bool) -> None:
    """Which `--limit` could do."""
    tasks = yaml.safe_load((ROOT / "roles/k3s/tasks/install.yml").read_text())
    read, validate = tasks[:2]
    read |= {"ansible.builtin.command": "echo 'k3s version v1.34.2+k3s1 (3dc2ae61)'"}
    variables = {"_k3s_is_server": False, "_k3s_others": ["localhost"], "_k3s_first": "x", "k3s_version": wanted}
    done = play(tmp_path, [read, validate], variables)
    assert (done.returncode == 0) == allowed, done.stdout
    assert (
        "the server localhost has v1.34.2+k3s1: upgrade the servers first" in " ".join(done.stdout.split())
    ) != allowed
