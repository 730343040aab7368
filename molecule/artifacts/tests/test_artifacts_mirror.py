"""A node without access to other networks gets the mirror's packages and files, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import testinfra
from testinfra.host import Host

STATE = Path(os.environ["ICTX_LAB_STATE"])


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(STATE / "ssh/config"))


def converge(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the scenario's playbook."""
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY"], os.environ["MOLECULE_CHECK"], *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_node_has_no_way_out() -> None:
    assert node("n1").run("ip route show default").stdout == ""
    assert (
        node("n1").run("timeout 5 python3 -c \"import socket; socket.create_connection(('192.0.2.1', 80), 3)\"").rc != 0
    )


def test_it_has_what_the_mirror_has() -> None:
    assert node("n1").package("grafana").version == "11.6.0"
    assert node("n1").package("grafana-data").is_installed
    assert node("n1").run("tool").stdout == "from the mirror\n"
    assert "http://10.203.89.11:8081/grafana" in node("n1").run("apt-cache policy grafana").stdout


def test_what_is_changed_on_the_mirror_is_refused_by_the_node() -> None:
    mirror, closed = node("m1"), node("n1")
    mirror.run_test("echo '# forged' >> /srv/artifacts/tools/1.0/tool")
    mirror.run_test("sed -i 's/stand-in/mallory/' /srv/artifacts/grafana/dists/stable/InRelease")
    closed.run_test("rm -f /usr/local/bin/tool /var/lib/apt/lists/*InRelease")
    try:
        assert closed.run("apt-get update -o APT::Update::Error-Mode=any").rc != 0
        done = converge("--limit", "n1")
        assert done.returncode != 0
        assert not closed.file("/usr/local/bin/tool").exists
    finally:
        # The control host's copy replaces what was changed there.
        done = converge()
    assert done.returncode == 0, done.stdout
    assert closed.run("tool").stdout == "from the mirror\n"


def test_a_mirror_that_is_down_is_one_error_and_nothing_changes() -> None:
    node("m1").run_test("systemctl stop nginx")
    node("n1").run_test("rm -f /usr/local/bin/tool")
    try:
        done = converge("--limit", "n1")
        assert done.returncode != 0
        assert "10.203.89.11:8081" in done.stdout + done.stderr
        assert not node("n1").file("/usr/local/bin/tool").exists
        assert node("n1").package("grafana").version == "11.6.0"
    finally:
        node("m1").run_test("systemctl start nginx")
    assert converge().returncode == 0
