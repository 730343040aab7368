"""Attacks on the served model through the node port, which anybody on the network can reach."""

from __future__ import annotations

import base64
import os
import re
import ssl
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from helm import CHARTS
from kubernetes import client, config
from kubernetes.stream import stream
from lab import STATE, Lab, wait_for
from serving import AUTHORITY, NAMESPACE, SERVER, Client, complete, endpoint, key

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def core() -> client.CoreV1Api:
    config.load_kube_config(str(STATE / "kubeconfig"))
    return client.CoreV1Api()


@pytest.fixture(scope="module")
def pod(core: client.CoreV1Api) -> Any:
    """The serving pod."""
    pods = core.list_namespaced_pod(NAMESPACE, label_selector=SERVER).items
    (found,) = [pod for pod in pods if not pod.metadata.deletion_timestamp]
    return found


@pytest.mark.attack(
    "H1",
    "Requests without the key, or with other credentials, to every listed and hidden path of the running vLLM",
    before="/invocations, /tokenize, /generative_scoring, /load, /version, /openapi.json, /metrics and others answered",
    now="401 for every path, method and spelling except GET /health",
)
def test_nothing_but_health_answers_without_the_key() -> None:
    done = subprocess.run(
        [sys.executable, CHARTS["serving"] / "files/walk.py"],
        env={**os.environ, "URL": endpoint(), "KEY": key(), "CA": str(AUTHORITY), "TIMEOUT": "60"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (count,) = re.findall(r"(\d+) paths are listed", done.stdout)
    assert int(count) > 10


@pytest.mark.attack(
    "H1",
    "A user of the cluster reads the served model's metrics through the node port, or at the pod's address",
    before="GET /metrics answered without a key",
    now="401 at the node port; the metrics port is reachable only inside Kubernetes",
)
def test_metrics_are_not_reached_from_outside(core: client.CoreV1Api, pod: Any, lab: Lab) -> None:
    curl = "curl -s -w '%{http_code}' --max-time 5 --cacert /etc/ictx/tls/ca.crt"
    reply = lab.run("n1", f"{curl} {endpoint()}/metrics", user="mallory").stdout
    assert reply.endswith("401")
    # There is no route; a proxy outside of the lab may respond with a page of its own.
    reply += lab.run("n1", f"{curl} http://{pod.status.pod_ip}:9100/metrics", user="mallory").stdout
    assert "vllm:" not in reply
    for service in core.list_namespaced_service(NAMESPACE).items:
        if service.metadata.name.endswith("-metrics"):
            assert service.spec.type == "ClusterIP"
        else:
            assert "metrics" not in {port.name for port in service.spec.ports}


def test_prometheus_scrapes_all_the_same(core: client.CoreV1Api, pod: Any) -> None:
    """Through the API server, as Prometheus does, which runs outside of Kubernetes."""
    name = f"{pod.metadata.name}:{pod.metadata.annotations['prometheus.io/port']}"
    assert "vllm:num_requests_running" in core.connect_get_namespaced_pod_proxy_with_path(name, NAMESPACE, "metrics")
    service = "ictx-serving-metrics:metrics"
    text = core.connect_get_namespaced_service_proxy_with_path(service, NAMESPACE, "metrics")
    assert "vllm:num_requests_running" in text


@pytest.mark.attack(
    "H1",
    "Searching the key in the arguments and the environment of vLLM's processes and in the pod's description",
    before="the key was in the environment of each process",
    now="the key is only in files, which a rotation replaces",
)
def test_the_key_is_in_no_argument_and_no_variable(core: client.CoreV1Api, pod: Any) -> None:
    look = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'"
    seen = inside(core, pod, "sh", "-c", look)
    assert "ictx.serve.gate.Gate" in seen
    assert key() not in seen
    assert key() not in str(pod)


def inside(core: client.CoreV1Api, pod: Any, *command: str) -> str:
    """Returns the output of a command in vLLM's container."""
    run = partial(stream, core.connect_get_namespaced_pod_exec, stderr=True, stdin=False, stdout=True, tty=False)
    return str(run(pod.metadata.name, NAMESPACE, command=list(command), container="vllm"))


def test_no_port_but_those_two_listens_on_the_pods_address(core: client.CoreV1Api, pod: Any) -> None:
    """Ports of vLLM's own processes are bound to the loopback address, regardless of the NetworkPolicy."""
    lines = inside(core, pod, "cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
    sockets = [line.split()[1] for line in lines if " 0A " in line]
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    ports = {int(port, 16) for host, port in (each.split(":") for each in sockets) if host not in loopback}
    assert ports == {8000, 9100}


@pytest.mark.attack(
    "L",
    "Creating a pod that runs as root, or with a folder of the node, in the platform's namespace",
    before="the namespace had no Pod Security labels",
    now="it admits restricted pods only, where Kubernetes enforces the standard (1.25 and later; the lab's does not)",
)
def test_the_namespace_admits_restricted_pods_only(core: client.CoreV1Api) -> None:
    labels = core.read_namespace(NAMESPACE).metadata.labels
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    # Namespaces that are shared with other applications are not changed.
    assert "pod-security.kubernetes.io/enforce" not in (core.read_namespace("default").metadata.labels or {})


@pytest.mark.attack(
    "H3",
    "Reading the key on the network, or impersonating the endpoint",
    before="the endpoint spoke plain HTTP",
    now="HTTPS with a certificate of the platform's authority; plain HTTP gets no response",
)
def test_the_endpoint_speaks_https_by_the_platforms_authority(lab: Lab) -> None:
    assert complete(key())[0] == 200
    address = lab.address("kube1")
    plain = f"curl -s -o /dev/null -w '%{{http_code}}' --max-time 10 http://{address}:30800/health"
    assert lab.run("n1", plain, user="mallory").stdout == "000"
    # The system's authorities do not verify it.
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        ssl.get_server_certificate((address, 30800), ca_certs=ssl.get_default_verify_paths().cafile)
    certificate = ssl.get_server_certificate((address, 30800), ca_certs=str(AUTHORITY))
    assert "BEGIN CERTIFICATE" in certificate


@pytest.mark.attack(
    "M8",
    "A replaced key of the served model is used",
    before="the pod kept the key from its start and rejected the new one",
    now="running pods read the new key, accept both during the overlap, then reject the old one",
)
def test_a_key_is_rotated_under_steady_clients(core: client.CoreV1Api, pod: Any) -> None:
    """Both keys are accepted for a while, then only the new one; no request is lost, and no pod restarts."""
    old, new = key(), "rotated" + key()[::-1]

    def give(now: str, previous: str) -> None:
        keys = {"api-key": now, "api-key-previous": previous}
        data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
        core.patch_namespaced_secret("ictx-serving-clients", NAMESPACE, {"data": data})
        # kubelet updates a Secret within 90 s, or immediately when the pod's metadata changes.
        mark = {"metadata": {"annotations": {"ictx/keys": str(time.time())}}}
        core.patch_namespaced_pod(pod.metadata.name, NAMESPACE, mark)

    try:
        with Client(lambda: old) as steady:
            wait_for("answers to the old key", lambda: steady.answered > 1)
            assert complete(new)[0] == 401
            give(new, previous=old)
            wait_for("an answer to the new key", lambda: complete(new)[0] == 200, seconds=180)
            answered = steady.answered
            wait_for("answers to both", lambda: complete(new)[0] == 200 and steady.answered > answered + 1)
        assert steady.failures == []
        with Client(lambda: new) as renewed:
            give(new, previous="")
            wait_for("the end of the old key", lambda: complete(old)[0] == 401, seconds=180)
            wait_for("answers to the new key", lambda: renewed.answered > 1)
        assert renewed.failures == []
    finally:
        give(old, previous="")
        wait_for("the key before the test", lambda: complete(old)[0] == 200, seconds=180)
    after = core.read_namespaced_pod(pod.metadata.name, NAMESPACE)
    assert [status.restart_count for status in after.status.container_statuses] == [
        status.restart_count for status in pod.status.container_statuses
    ]
