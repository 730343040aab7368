"""Prometheus' discovery of Kubernetes finds the same targets as our lister, with the same labels.

Debian builds Prometheus without kubernetes_sd. promtool therefore reads the discovered targets from a file, and applies
the relabelling rules of the rendered configuration.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, Cluster
from monitoring.test_kubernetes_targets import API, NODE, SIX, pod, service, targets
from programs import program

PODS = [
    pod(scrape="true", port="8000", path="/stats"),
    pod(scrape="true", port="8001"),
    pod("False", scrape="true", port="8000"),
    pod(scrape="false", port="8000"),
    pod(scrape="true", port="http"),
    pod(),
]
STATE = pod()
STATE["metadata"] |= {"name": "ksm-0", "namespace": "ictx-monitoring"}
STATE["metadata"]["labels"] = {"app.kubernetes.io/name": "kube-state-metrics"}
STATE["status"]["phase"] = "Running"
METRICS = service("serving", name="metrics")
METRICS["metadata"]["name"] += "-metrics"
SERVICES = [METRICS, service("mlflow", name="metrics"), service("serving", name="https")]


def meta(kind: str, **labels: str) -> dict[str, str]:
    """Returns labels in the notation of kubernetes_sd."""
    return {f"__meta_kubernetes_{kind}_{name}".replace("__name__", ""): value for name, value in labels.items()}


def described(kind: str, thing: Any) -> dict[str, str]:
    """Returns the labels that pods and Services have in common."""
    about = thing["metadata"]
    found = {"__meta_kubernetes_namespace": about["namespace"], f"__meta_kubernetes_{kind}_name": about["name"]}
    for what in ("label", "annotation"):
        for name, value in (about.get(f"{what}s") or {}).items():
            found[f"__meta_kubernetes_{kind}_{what}_{''.join(c if c.isalnum() else '_' for c in name)}"] = value
    return found


def of_node(node: Any) -> tuple[str, dict[str, str]]:
    """Returns the target of the role node."""
    address = next(each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP")
    address = f"[{address}]" if ":" in address else address
    name = node["metadata"]["name"]
    return f"{address}:10250", {**meta("node", name=name), "instance": name}


def of_pod(each: Any) -> list[tuple[str, dict[str, str]]]:
    """Returns the targets of the role pod, one for each port of a container."""
    ready = next((c["status"] for c in each["status"]["conditions"] if c["type"] == "Ready"), "unknown").lower()
    about = described("pod", each) | meta("pod", ready=ready, node_name=each["spec"]["nodeName"])
    about |= meta("pod", phase=each["status"].get("phase", "Pending"))
    return [(f"10.42.0.9:{port}", {**about, **meta("pod", container_port_number=port)}) for port in ("8080", "8081")]


def of_service(each: Any) -> list[tuple[str, dict[str, str]]]:
    """Returns the targets of the role service, one for each port."""
    about = described("service", each)
    ports = each["spec"]["ports"]
    return [
        (f"s.ns.svc:{port['port']}", {**about, **meta("service", port_name=port.get("name", ""))}) for port in ports
    ]


SLICES = [
    ("192.0.2.31:6443", meta("service", name="kubernetes")),
    ("192.0.2.99:80", meta("service", name="somebody-else")),
]
ENDPOINTS = {"subsets": [{"addresses": [{"ip": "192.0.2.31"}], "ports": [{"port": 6443}]}]}
FOUND_PODS = [found for each in [*PODS, STATE] for found in of_pod(each)]
FOUND_SERVICES = [found for each in SERVICES for found in of_service(each)]
CASES: dict[str, tuple[list[tuple[str, dict[str, str]]], list[Any]]] = {
    "nodes": ([of_node(NODE), of_node(SIX)], list(targets.node_targets({"items": [NODE, SIX]}))),
    "cadvisor": ([of_node(NODE)], list(targets.node_targets({"items": [NODE]}, "/metrics/cadvisor"))),
    "apiserver": (SLICES, list(targets.server_targets(ENDPOINTS))),
    "pods": (FOUND_PODS, list(targets.pod_targets({"items": PODS}, API))),
    "services": (FOUND_SERVICES, list(targets.service_targets({"items": SERVICES}, API))),
    "state": (FOUND_PODS, list(targets.state_targets({"items": [STATE]}, API))),
}


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    """Returns the scrape jobs of the configuration for upstream's Prometheus, by name."""
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": "/state", "prometheus_source": "upstream"})
    about = {"name": "c", "api_server": f"https://{API}", "namespaces": ["ictx", "ictx-monitoring"]}
    for role, play, hosts in cluster.uses("playbooks/monitoring.yml"):
        if role.get_name() == "prometheus":
            variables = {**cluster.variables(hosts[0], play, role), "_prometheus_kubernetes": [about]}
            variables |= {"_prometheus_scrapes": [], "prometheus_alertmanagers": []}
            text = cluster.render(ROOT / "roles/prometheus/templates/prometheus.yml.j2", variables)
            return {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    raise AssertionError("playbooks/monitoring.yml does not run the role")


@pytest.mark.parametrize("name", CASES)
def test_discovery_finds_what_the_lister_finds(jobs: dict[str, Any], name: str, tmp_path: Path) -> None:
    discovered, listed = CASES[name]
    job = jobs[f"kubernetes-c-{name}"]
    (own,) = job["kubernetes_sd_configs"]
    assert own["api_server"] == f"https://{API}"
    assert own["authorization"] == job["authorization"]
    assert "file_sd_configs" not in job

    def resulting(relabel: list[Any], found: list[Any]) -> set[str]:
        (tmp_path / "targets.json").write_text(json.dumps(found))
        files = [{"files": [f"{tmp_path}/targets.json"]}]
        config = {"scrape_configs": [{"job_name": "j", "file_sd_configs": files, "relabel_configs": relabel}]}
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        look = ["check", "service-discovery", "--timeout=2s", f"{tmp_path}/prometheus.yml", "j"]
        done = subprocess.run([program("promtool"), *look], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kept = [each["labels"] for each in json.loads(done.stdout) if each["labels"]]
        # Prometheus drops labels with this prefix.
        kept = [{name: value for name, value in labels.items() if name != "__tmp_path"} for labels in kept]
        return {json.dumps({"instance": labels["__address__"], **labels}, sort_keys=True) for labels in kept}

    cluster = [{"target_label": "cluster", "replacement": "c"}]
    there = [{"targets": [address], "labels": labels} for address, labels in discovered]
    assert resulting(job["relabel_configs"], there) == resulting(cluster, listed)
    assert listed
