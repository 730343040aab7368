"""Prometheus, two Alertmanagers and Grafana on separate nodes: their connections, and who may query them."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host

STATE = Path(os.environ["ICTX_LAB_STATE"])
ADDRESSES = {"m1": "10.203.87.11", "m2": "10.203.87.12"}
TLS = ssl.create_default_context(cafile=str(STATE / "ca/ca.crt"))
PORTS = {"m1": [5000, 9090, 9093, 9100, 9115], "m2": [3000, 9093, 9100]}


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(STATE / "ssh/config"))


def secret(name: str) -> str:
    """Returns a password that the playbook generated."""
    return (STATE / "secrets" / name).read_text().split(" salt=")[0].strip()


def ask(name: str, port: int, path: str, login: str = "") -> tuple[int, Any]:
    """Returns the HTTP status and the JSON of a response (None for an error)."""
    request = urllib.request.Request(f"https://{ADDRESSES[name]}:{port}{path}")
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, context=TLS, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None


def admin() -> str:
    """Returns the login of the administrator."""
    return f"admin:{secret('prometheus_password')}"


@pytest.mark.parametrize(("name", "port"), [(name, port) for name, ports in PORTS.items() for port in ports])
def test_every_port_asks_for_a_password_over_tls(name: str, port: int) -> None:
    path = {3000: "/api/search", 5000: "/v2/"}.get(port, "/metrics")
    assert ask(name, port, path)[0] == 401
    assert ask(name, port, path, "admin:wrong")[0] == 401


@pytest.mark.parametrize(("name", "port"), [("m1", 9090), ("m1", 9093), ("m2", 9093)])
def test_the_password_of_exporters_opens_exporters_only(name: str, port: int) -> None:
    assert ask(name, port, "/metrics", f"metrics:{secret('metrics_password')}")[0] == 401


def test_the_registry_tells_its_metrics_on_its_own_host_only() -> None:
    listening = node("m1").check_output("ss --listening --tcp --numeric --no-header")
    assert re.findall(r"(\S+):5001\b", listening) == ["127.0.0.1"]


def test_every_target_is_up() -> None:
    end = time.monotonic() + 60
    while True:
        targets = ask("m1", 9090, "/api/v1/targets", admin())[1]["data"]["activeTargets"]
        down = [(t["labels"]["job"], t["lastError"]) for t in targets if t["health"] != "up"]
        if not down or time.monotonic() > end:
            break
        time.sleep(2)
    assert down == []
    jobs = {target["labels"]["job"] for target in targets}
    assert jobs == {"node", "blackbox", "prometheus", "alertmanager", "endpoints"}


def test_the_alertmanagers_are_one_cluster_and_prometheus_knows_both() -> None:
    peers = {peer["address"] for peer in ask("m1", 9093, "/api/v2/status", admin())[1]["cluster"]["peers"]}
    assert peers == {"10.203.87.11:9094", "10.203.87.12:9094"}
    active = ask("m1", 9090, "/api/v1/alertmanagers", admin())[1]["data"]["activeAlertmanagers"]
    assert len(active) == 2


def test_nobody_gossips_without_a_certificate_of_the_platform() -> None:
    plain = socket.create_connection((ADDRESSES["m2"], 9094), timeout=10)
    connection = TLS.wrap_socket(plain, server_hostname=ADDRESSES["m2"])
    # In TLS 1.3, the server rejects the client in its first response.
    with connection, pytest.raises((ssl.SSLError, ConnectionError)):
        connection.recv(1)


def test_a_silence_of_one_alertmanager_reaches_the_other() -> None:
    silence = "amtool silence add alertname=Test --comment=test --author=test --duration=10m --alertmanager.url=https://m1:9093"
    config = "{basic_auth: {username: admin, password: '" + secret("prometheus_password") + "'}"
    config += ", tls_config: {ca_file: /etc/ictx/tls/ca.crt}}"
    made = node("m1").run(f'umask 077; echo "{config}" >/run/amtool.yml; {silence} --http.config.file=/run/amtool.yml')
    assert made.rc == 0, made.stderr
    end = time.monotonic() + 30
    while not ask("m2", 9093, "/api/v2/silences", admin())[1]:
        assert time.monotonic() < end, "the silence did not reach the other Alertmanager"
        time.sleep(1)


def test_rules_and_dashboards_are_there() -> None:
    groups = ask("m1", 9090, "/api/v1/rules", admin())[1]["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    boards = ask("m2", 3000, "/api/search", f"admin:{secret('grafana_password')}")[1]
    assert {"Fleet", "Nodes & storage", "Serving", "Training run"} <= {board["title"] for board in boards}


def test_a_check_run_finds_nothing_to_change() -> None:
    done = subprocess.run(
        ["ansible-playbook", "--check", "-i", os.environ["MOLECULE_INVENTORY"], os.environ["MOLECULE_CHECK"]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    recap = dict(re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", done.stdout, re.MULTILINE))
    assert recap == {"localhost": "0", "m1": "0", "m2": "0"}
