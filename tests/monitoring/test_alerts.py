"""An alert on its whole way in the lab: a daemon stops → Prometheus → Alertmanager → a webhook, and back again."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from lab import STATE, Lab

pytestmark = pytest.mark.lab

CONFIG = "/etc/prometheus/alertmanager.yml"


@pytest.fixture
def lab() -> Lab:
    """The lab that `make lab` left running."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()


@pytest.fixture
def notifications(lab: Lab) -> Iterator[queue.Queue[dict[str, Any]]]:
    """Returns what Alertmanager sends to a webhook of the test; its configuration is put back at the end."""
    received: queue.Queue[dict[str, Any]] = queue.Queue()

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
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
        # In place: the file keeps its owner and mode.
        done = lab.run(
            "svc1", f"cp -p {CONFIG} {CONFIG}.kept && printf %s '{text}' >{CONFIG} && amtool check-config {CONFIG}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lab.run("svc1", "systemctl reload prometheus-alertmanager")
        yield received
    finally:
        lab.run("svc1", f"mv {CONFIG}.kept {CONFIG}; systemctl reload prometheus-alertmanager")
        server.shutdown()


def wait_for(
    received: queue.Queue[dict[str, Any]], status: str, alert: str, node: str, seconds: float
) -> dict[str, Any]:
    """Returns the alert of a notification with this status; fails when none comes in time."""
    end = time.monotonic() + seconds
    seen = []
    while time.monotonic() < end:
        try:
            message = received.get(timeout=5)
        except queue.Empty:
            continue
        for entry in message["alerts"]:
            seen.append((entry["status"], entry["labels"]["alertname"]))
            if seen[-1] == (status, alert) and entry["labels"].get("node") == node:
                return entry
    raise AssertionError(f"{alert} for {node} was not {status} within {seconds:.0f} s; seen: {seen}")


def test_a_slurmd_that_stops_is_told_and_told_again_when_it_is_back(
    lab: Lab, notifications: queue.Queue[dict[str, Any]]
) -> None:
    try:
        lab.run("n2", "systemctl stop slurmd")
        alert = wait_for(notifications, "firing", "SlurmNodeUnavailable", "n2", 300)
        assert alert["labels"]["severity"] == "critical"
        assert alert["labels"]["cluster"] == "lab"
        assert alert["annotations"]["description"].startswith("n2 takes no jobs")
        assert alert["annotations"]["runbook_url"].endswith("/SlurmNodeUnavailable.md")
    finally:
        lab.run("n2", "systemctl start slurmd")
    wait_for(notifications, "resolved", "SlurmNodeUnavailable", "n2", 180)
