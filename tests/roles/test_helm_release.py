"""roles/helm_release and the release tasks of playbooks/serving.yml, with helm and a real Kubernetes API."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from kubernetes_api import api_server, kubectl
from programs import play

pytestmark = pytest.mark.full

SHARED = {"name": "keys", "data": {"key": "of all"}}
MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: {{ .Release.Name }}-own}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an API server's kubeconfig, and a chart that needs no node, with two installed releases."""
    made = tmp_path_factory.mktemp("helm")
    (made / "serving/templates").mkdir(parents=True)
    (made / "serving/Chart.yaml").write_text("apiVersion: v2\nname: serving\nversion: 1.2.3\n")
    (made / "serving/templates/map.yaml").write_text(MAP)
    with api_server(made):
        installed(made, "next", "large")
        yield made


def played(folder: Path, *tasks: dict[str, Any], **variables: Any) -> tuple[int, str]:
    """Runs tasks as playbooks/serving.yml does; returns the number of changed tasks, and the output."""
    server = {"ansible.builtin.add_host": {"name": "kube1", "groups": "k3s_server"}, "changed_when": False}
    done = play(folder, [server, *tasks], {"ictx_state_dir": str(folder), **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return sum(int(number) for number in re.findall(r" changed=(\d+) ", done.stdout)), " ".join(done.stdout.split())


def installed(folder: Path, *names: str) -> None:
    """Installs releases as playbooks/tasks/serving_release.yml does: each with its own Secret, and shared ones."""
    variables = {
        "helm_release_name": "{{ item }}",
        "helm_release_chart": str(folder / "serving"),
        "helm_release_cache_dir": str(folder / "cache"),
        "helm_release_kubeconfig": str(folder / "kubeconfig"),
        "helm_release_secrets": [SHARED, {"name": "{{ item }}-serving-tls", "data": {"tls.key": "x"}}],
        "helm_release_config_maps": [{"name": "ca", "data": {"ca.crt": "x"}}],
    }
    role = {"ansible.builtin.include_role": {"name": "helm_release"}, "loop": list(names), "vars": variables}
    played(folder, role)


def task(name: str) -> dict[str, Any]:
    """Returns a task of the playbook."""
    (serving,) = yaml.safe_load((ROOT / "playbooks/serving.yml").read_text())
    return next(each for each in serving["post_tasks"] if each["name"] == name)


def objects(folder: Path) -> set[str]:
    """Returns the Secrets, ConfigMaps and releases of the namespace."""
    look = [*kubectl(folder), "--namespace=ictx", "get", "secrets,configmaps", "-oname"]
    done = subprocess.run(look, check=True, capture_output=True, text=True)
    return {name for name in done.stdout.split() if "/kube-root-ca" not in name}


def test_a_removed_release_leaves_nothing_of_its_own(folder: Path) -> None:
    before = objects(folder)
    assert "secret/next-serving-tls" in before
    remove = task("Remove releases")
    releases = [{"name": "next", "state": "absent"}, {"name": "large", "model": "large"}]
    look = {"block": [remove], "check_mode": True}
    assert played(folder, look, ictx_serving_releases=releases)[0] > 0
    assert objects(folder) == before, "check mode removes nothing"
    assert played(folder, remove, ictx_serving_releases=releases)[0] == 2
    gone = {"secret/next-serving-tls", "configmap/next-own", "secret/sh.helm.release.v1.next.v1"}
    assert objects(folder) == before - gone
    assert played(folder, remove, ictx_serving_releases=releases)[0] == 0


def test_a_release_that_was_deleted_from_the_list_is_reported(folder: Path) -> None:
    helm = [Path(sys.executable).parent / "helm", f"--kubeconfig={folder}/kubeconfig", "--namespace=ictx"]
    subprocess.run([*helm, "install", "anothers", folder / "serving"], check=True, capture_output=True)
    tasks = [task("List the installed releases"), task("Report releases that are not in ictx_serving_releases")]
    mine = [{"name": "next", "state": "absent"}]
    changed, text = played(folder, *tasks, ictx_serving_releases=mine)
    assert changed == 0
    assert (
        "large: installed by an earlier run, not in ictx_serving_releases, and still running. To remove it, add" in text
    )
    assert "anothers" not in text
    assert "still running" not in played(folder, *tasks, ictx_serving_releases=[*mine, {"name": "large"}])[1]
