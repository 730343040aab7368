"""kube-state-metrics: its objects in Kubernetes are valid and restricted, and may read only what it exposes."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """Returns the objects by their kinds."""
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": "/state"})
    for role, play, _ in cluster.uses("playbooks/monitoring.yml"):
        if role.get_name() == "kube_state_metrics":
            variables = cluster.variables("localhost", play, role)
            answer = {"status": 200, "item": {"address": "registry.example:5000"}}
            variables["_kube_state_metrics_answers"] = {"results": [{"status": 404, "item": {"address": "a"}}, answer]}
            templar = Templar(cluster.loader, variables=variables)
            text = cluster.render(ROOT / "roles/kube_state_metrics/templates/objects.yaml.j2", variables)
            assert templar.template(trusted("{{ _kube_state_metrics_image }}")).startswith("registry.example:5000/")
            return {each["kind"]: each for each in yaml.safe_load_all(text) if each}
    raise AssertionError("playbooks/monitoring.yml does not run the role")


@pytest.mark.parametrize("version", ["1.29", "1.34", "1.37"])
def test_objects_are_valid(objects: dict[str, Any], version: str) -> None:
    for each in objects.values():
        kubernetes_validate.validate(each, version, strict=True)


def test_it_may_list_what_it_exposes_and_no_secret(objects: dict[str, Any]) -> None:
    may = {resource for rule in objects["ClusterRole"]["rules"] for resource in rule["resources"]}
    assert all(rule["verbs"] == ["list", "watch"] for rule in objects["ClusterRole"]["rules"])
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    listed = next(word for word in container["args"] if word.startswith("--resources="))
    assert set(listed.partition("=")[2].split(",")) == may
    rules = (ROOT / "roles/prometheus/templates/rules/kubernetes.yml").read_text()
    # Metrics in alerts: the second word is the kind, e.g. kube_pod_init_container_… belongs to pods.
    kinds = {name.split("_")[1] for name in re.findall(r"\bkube_\w+(?=[{ ])", rules)}
    assert kinds <= {resource.removesuffix("s") for resource in may}
    assert len(kinds) == 6


def test_its_image_is_that_of_the_lock() -> None:
    lock = yaml.safe_load((ROOT / "playbooks/vars/artifacts.yml").read_text())["artifacts_lock"]
    entry = next(each for each in lock if each["name"] == "kube-state-metrics")
    role = yaml.safe_load((ROOT / "roles/kube_state_metrics/defaults/main.yml").read_text())
    assert entry["version"] == role["kube_state_metrics_version"]
    assert f"sha256:{entry['sha256']}" == role["kube_state_metrics_digest"]
    known = f"{role['kube_state_metrics_registries'][0]['address']}/{role['kube_state_metrics_repository']}"
    assert entry["url"] == known
