"""Alerts in the lab, end to end: a fault → Prometheus → Alertmanager → a webhook, and the end of the fault.

All faults start and end together, so that the delays (each alert's `for`) overlap.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from lab import STATE, Lab

pytestmark = [pytest.mark.lab, pytest.mark.full]

CONFIG = "/etc/prometheus/alertmanager.yml"


@pytest.fixture(scope="module")
def lab() -> Lab:
    """The running lab that `make lab` provisioned."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()


@pytest.fixture(scope="module")
def notifications(lab: Lab) -> Iterator[list[dict[str, Any]]]:
    """Yields the alerts that Alertmanager sends to the test's webhook; restores the configuration at the end."""
    received: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    gateway = lab.run("svc1", "ip -4 route show default").stdout.split()[2]
    server = ThreadingHTTPServer((gateway, 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = yaml.safe_load(lab.run("svc1", f"cat {CONFIG}").stdout)
    config["receivers"].append(
        {"name": "test", "webhook_configs": [{"url": f"http://{gateway}:{server.server_port}/"}]}
    )
    config["route"] |= {
        "receiver": "test",
        "group_wait": "1s",
        "group_interval": "5s",
        "group_by": ["alertname", "node"],
    }
    try:
        text = json.dumps(config).replace("'", "'\\''")
        # Written in place to keep owner and mode.
        done = lab.run(
            "svc1", f"cp -p {CONFIG} {CONFIG}.kept && printf %s '{text}' >{CONFIG} && amtool check-config {CONFIG}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lab.run("svc1", "systemctl reload prometheus-alertmanager")
        yield received
    finally:
        lab.run("svc1", f"mv {CONFIG}.kept {CONFIG}; systemctl reload prometheus-alertmanager")
        server.shutdown()


def wait_for(received: list[dict[str, Any]], status: str, seconds: float, **labels: str) -> dict[str, Any]:
    """Returns the first alert with this status and these labels; fails if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for alert in list(received):
            if alert["status"] == status and labels.items() <= alert["labels"].items():
                return alert
        time.sleep(1)
    seen = [(alert["status"], alert["labels"]["alertname"]) for alert in received]
    raise AssertionError(f"{labels} was not {status} within {seconds:.0f} s; seen: {seen}")


def kubectl(lab: Lab, command: str) -> None:
    """Runs kubectl as the administrator, which must succeed."""
    done = subprocess.run(
        [
            "ssh",
            "-F",
            STATE / "ssh/config",
            "kube1",
            "--",
            f"kubectl --kubeconfig /dev/stdin --namespace ictx {command}",
        ],
        input=(STATE / "kubeconfig").read_text(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


FULL = "/mnt/alert-test"
# A separate file system, since the lab's nodes share the machine's disk.
FILL = f"""set -e
truncate --size=64M {FULL}.img; mkfs.ext4 -q -m 0 {FULL}.img; mkdir -p {FULL}; mount -o loop {FULL}.img {FULL}
dd if=/dev/zero of={FULL}/checkpoint bs=1M status=none || df --output=pcent {FULL} | grep -E '9[6-9]|100'
# A machine hands new mounts on to units that run; a container does not.
systemctl restart prometheus-node-exporter"""
# Prometheus must scrape the free space before the file system is removed.
EMPTY = f"rm -f {FULL}/checkpoint"
REMOVE = f"umount {FULL}; rm -rf {FULL} {FULL}.img"

# Fault: labels of the alert, and the start of its description.
FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "slurmd stops": ({"alertname": "SlurmNodeUnavailable", "node": "n2", "severity": "critical"}, "n2 accepts no jobs"),
    "a disk is full": (
        {"alertname": "NodeFilesystemAlmostFull", "node": "n1"},
        "/dev/loop",
    ),
    "vLLM is gone": ({"alertname": "ServingDown", "instance": "ictx-serving"}, "No pod of ictx-serving responds"),
}


@pytest.fixture(scope="module")
def broken(lab: Lab, notifications: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yields the notifications after all faults were injected; always removes the faults."""
    try:
        for node, command in (("n2", "systemctl stop slurmd"), ("n1", FILL)):
            done = lab.run(node, command)
            assert done.returncode == 0, done.stderr
        kubectl(lab, "scale deployment ictx-serving --replicas=0")
        yield notifications
    finally:
        lab.run("n1", REMOVE)
        lab.run("n2", "systemctl start slurmd")
        kubectl(lab, "scale deployment ictx-serving --replicas=1")
        kubectl(lab, "rollout status deployment ictx-serving --timeout=300s")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(broken: list[dict[str, Any]], fault: str) -> None:
    labels, says = FAULTS[fault]
    alert = wait_for(broken, "firing", 300, **labels)
    assert alert["labels"]["severity"] == "critical"
    assert alert["labels"]["cluster"] == "lab"
    assert alert["annotations"]["description"].startswith(says)
    assert alert["annotations"]["runbook_url"].endswith(f"/{labels['alertname']}.md")


@pytest.fixture(scope="module")
def repaired(lab: Lab, broken: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the notifications after all faults were removed."""
    for node, command in (("n2", "systemctl start slurmd"), ("n1", EMPTY)):
        assert lab.run(node, command).returncode == 0
    kubectl(lab, "scale deployment ictx-serving --replicas=1")
    return broken


@pytest.mark.parametrize("fault", FAULTS)
def test_its_end_is_reported_too(repaired: list[dict[str, Any]], fault: str) -> None:
    wait_for(repaired, "resolved", 300, **FAULTS[fault][0])
