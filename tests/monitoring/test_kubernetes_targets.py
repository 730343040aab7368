"""Prometheus' targets in Kubernetes: the program on objects of the API, and without a response."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import certifi
import pytest
from cluster import ROOT
from programs import loaded

PROGRAM = ROOT / "roles/prometheus/files/prometheus-kubernetes-targets"
targets = loaded(PROGRAM)

API = "192.0.2.31:6443"
NODE = {
    "metadata": {"name": "k3s1"},
    "status": {
        "addresses": [{"type": "Hostname", "address": "k3s1"}, {"type": "InternalIP", "address": "192.0.2.31"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
    },
}
SIX = {**NODE, "status": {**NODE["status"], "addresses": [{"type": "InternalIP", "address": "2001:db8::1"}]}}


def pod(ready: str = "True", **annotations: str) -> dict[str, Any]:
    """Returns a pod of charts/serving with annotations prometheus.io/*."""
    return {
        "metadata": {
            "name": "ictx-serving-0",
            "namespace": "ictx",
            "labels": {"app.kubernetes.io/name": "serving", "app.kubernetes.io/instance": "ictx"},
            "annotations": {f"prometheus.io/{name}": value for name, value in annotations.items()},
        },
        "spec": {"nodeName": "kgpu1"},
        "status": {"conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}]},
    }


def service(app: str, **port: Any) -> dict[str, Any]:
    """Returns a Service of a chart."""
    labels = {"app.kubernetes.io/name": app, "app.kubernetes.io/instance": "ictx"}
    return {
        "metadata": {"name": f"ictx-{app}", "namespace": "ictx", "labels": labels},
        "spec": {"ports": [{"port": 80, **port}]},
    }


def test_kubelets_are_asked_themselves() -> None:
    (plain,) = targets.node_targets({"items": [NODE]})
    assert plain == {"targets": ["192.0.2.31:10250"], "labels": {"node": "k3s1"}}
    (cadvisor,) = targets.node_targets({"items": [SIX]}, "/metrics/cadvisor")
    assert cadvisor["targets"] == ["[2001:db8::1]:10250"]
    assert cadvisor["labels"]["__metrics_path__"] == "/metrics/cadvisor"


@pytest.mark.parametrize(("status", "ready"), [("True", 1), ("False", 0), ("Unknown", 0)])
def test_a_node_is_ready_when_its_condition_is_true(status: str, ready: int) -> None:
    conditions = [{"type": "MemoryPressure", "status": "True"}, {"type": "Ready", "status": status}]
    node = {**NODE, "status": {**NODE["status"], "conditions": conditions}}
    assert list(targets.readiness({"items": [node]}, "lab")) == [
        f'kubernetes_node_ready{{cluster="lab",node="k3s1"}} {ready}\n'
    ]


def test_every_api_server_is_a_target() -> None:
    endpoints = {"subsets": [{"addresses": [{"ip": "192.0.2.31"}, {"ip": "192.0.2.32"}], "ports": [{"port": 6443}]}]}
    assert [each["targets"] for each in targets.server_targets(endpoints)] == [["192.0.2.31:6443"], ["192.0.2.32:6443"]]


def test_a_pod_that_asks_for_it_is_a_target_when_it_is_ready() -> None:
    (found,) = targets.pod_targets({"items": [pod(scrape="true", port="8000", path="/stats")]}, API)
    assert found["targets"] == [API]
    assert found["labels"] == {
        "__metrics_path__": "/api/v1/namespaces/ictx/pods/ictx-serving-0:8000/proxy/stats",
        "instance": "ictx-serving-0:8000",
        "namespace": "ictx",
        "pod": "ictx-serving-0",
        "node": "kgpu1",
        "app": "serving",
        "release": "ictx",
    }
    others = [pod(), pod(scrape="false", port="8000"), pod(scrape="true"), pod(scrape="true", port="http/x")]
    assert list(targets.pod_targets({"items": [*others, pod("False", scrape="true", port="8000")]}, API)) == []


def test_a_service_of_a_served_model_is_a_target_even_without_pods() -> None:
    metrics = service("serving", name="metrics")
    metrics["metadata"]["name"] += "-metrics"
    others = [service("mlflow", name="metrics"), service("serving", name="https"), service("serving")]
    (found,) = targets.service_targets({"items": [*others, metrics]}, API)
    path = "/api/v1/namespaces/ictx/services/ictx-serving-metrics:metrics/proxy/metrics"
    assert found["labels"]["__metrics_path__"] == path
    assert found["labels"]["instance"] == "ictx-serving"


def test_kube_state_metrics_is_a_target_without_the_labels_of_its_pod() -> None:
    state = pod("False")
    state["metadata"] |= {"name": "ksm-0", "namespace": "ictx-monitoring"}
    state["metadata"]["labels"] = {"app.kubernetes.io/name": "kube-state-metrics"}
    state["status"]["phase"] = "Running"
    gone = {**state, "status": {"phase": "Failed"}}
    (found,) = targets.state_targets({"items": [pod(), gone, state]}, API)
    path = "/api/v1/namespaces/ictx-monitoring/pods/ksm-0:8080/proxy/metrics"
    # A pod that is not ready stays a target, so that TargetDown fires.
    assert found == {"targets": [API], "labels": {"__metrics_path__": path, "instance": "ksm-0:8080"}}


def run(tmp_path: Path, api: str) -> subprocess.CompletedProcess[str]:
    """Runs the program for one cluster."""
    (tmp_path / "token").write_text("secret\n")
    settings = {"name": "lab", "api_server": api, "namespaces": ["ictx"]}
    settings |= {"token_file": f"{tmp_path}/token", "ca_file": certifi.where()}
    (tmp_path / "lab.json").write_text(json.dumps(settings))
    command = [
        sys.executable,
        PROGRAM,
        "--output",
        tmp_path,
        "--metrics",
        tmp_path / "nodes.prom",
        "--settings",
        tmp_path / "lab.json",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


OBJECTS: dict[str, Any] = {
    "/api/v1/nodes": {"items": [NODE]},
    "/api/v1/namespaces/default/endpoints/kubernetes": {},
    "/api/v1/namespaces/ictx/pods": {"items": []},
    "/api/v1/namespaces/ictx/services": {"items": []},
}


class Api(BaseHTTPRequestHandler):
    """Responds as the API does to an authorized token; rejects any other."""

    def do_GET(self) -> None:
        """Sends the list, or an error."""
        allowed = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if allowed else 403)
        self.end_headers()
        self.wfile.write(json.dumps(OBJECTS[self.path] if allowed else {}).encode())

    def log_message(self, *words: object) -> None:
        """Suppresses the log of requests."""


@pytest.fixture
def api() -> Iterator[str]:
    """Yields the address of such an API."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_cluster_that_does_not_answer_keeps_its_targets(tmp_path: Path, api: str) -> None:
    assert run(tmp_path, api).returncode == 0
    before = (tmp_path / "kubernetes-lab-nodes.json").read_text()
    assert json.loads(before)[0]["targets"] == ["192.0.2.31:10250"]
    assert json.loads((tmp_path / "kubernetes-lab-pods.json").read_text()) == []
    assert 'kubernetes_node_ready{cluster="lab",node="k3s1"} 0\n' in (tmp_path / "nodes.prom").read_text()
    ended = run(tmp_path, "http://127.0.0.1:9")
    assert ended.returncode == 1
    assert "http://127.0.0.1:9 not reachable" in ended.stderr
    assert (tmp_path / "kubernetes-lab-nodes.json").read_text() == before
