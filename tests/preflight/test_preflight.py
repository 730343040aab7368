"""playbooks/preflight.yml as users run it: one process reports all problems, sets its status and changes nothing."""

from __future__ import annotations

import base64
import os
import re
import ssl
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from cluster import ROOT
from programs import loaded

GROUPS = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())["groups"]
EMPTY = ("k3s_agent", "storage_server")


def preflight(folder: Path, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Runs preflight on a cluster with this machine as its only node, an additional `gone`, or other `groups`."""
    inventory = {
        "all": {
            "vars": {
                "ictx_cache_dir": str(folder / "cache"),
                "ictx_cluster_name": "test",
                "ictx_registry": "here:5000",
                "ictx_shared_dir": "/proc",
                "ictx_shared_min_free_gb": 0,
                "ictx_state_dir": str(folder / "state"),
                "ictx_users": [],
                "image_bake_base": {"release": "bookworm"},
                "ansible_become": False,
                "storage_type": "external",
            },
            "hosts": {"here": {"ansible_connection": "local"}},
            "children": {name: {"hosts": {"here": None}} for name in GROUPS if name not in EMPTY}
            | dict.fromkeys(EMPTY),
        }
    }
    for name, value in variables.items():
        if name == "groups":
            inventory["all"]["children"] |= {group: {"hosts": dict.fromkeys(hosts)} for group, hosts in value.items()}
        elif name == "gone":
            inventory["all"]["hosts"]["gone"] = value
        else:
            inventory["all"]["vars"][name] = value
    file = folder / "inventory.yml"
    file.write_text(yaml.safe_dump(inventory))
    return subprocess.run(
        ["ansible-playbook", "-i", str(file), "--check", "playbooks/preflight.yml", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("debian 12", ""),
        ("debian 13", ""),
        ("ubuntu 24.04", ""),
        ("ubuntu 22.04", "its SLURM 21.08, Prometheus 2.31"),
        ("rocky 9.4", "this platform is not tested on it"),
    ],
)
def test_a_system_that_is_not_supported_is_refused_with_the_reason(system: str, reason: str) -> None:
    check = loaded(ROOT / "playbooks/plugins/action/check_node.py")
    answer = {"stdout": f"python\nsystem {system}\n", "stderr": "", "rc": 0}
    problems = check.ActionModule._problems("host n1 (192.0.2.1)", answer, "/shared", 5)
    assert bool(problems) == bool(reason)
    assert all(f"host n1 (192.0.2.1): {system} is not supported ({reason}" in line for line in problems)


def test_a_sound_cluster_passes(tmp_path: Path) -> None:
    # Variables that a play sets may be overridden on the command line, which has an effect there.
    done = preflight(tmp_path, "--extra-vars", '{"slurm_users": []}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout
    assert "failed=0" in done.stdout


def test_every_problem_is_one_line_and_all_are_reported_at_once(tmp_path: Path) -> None:
    done = preflight(
        tmp_path,
        gone={"ansible_host": "127.0.0.1", "ansible_port": 1, "ictx_address": "192.0.2.9"},
        ictx_shared_min_free_gb=0.001,
        slurm_process_tracking="foo",
    )
    assert done.returncode != 0
    output = (done.stdout + done.stderr).splitlines()
    start = next(n for n, line in enumerate(output) if line.endswith("nothing was changed, problems: 3"))
    found = output[start + 1 : start + 4]
    assert "- slurm_process_tracking (all hosts): must be one of: cgroup, linuxproc, got: foo" in found
    assert (
        "- the shared directory /proc has 0.0 GB free, needs 0.001: delete unneeded runs below /proc/runs, "
        "or lower ictx_shared_min_free_gb"
    ) in found
    refused = "- host gone (127.0.0.1): cannot be reached (ssh: connect to host 127.0.0.1 port 1: Connection refused): "
    assert [line for line in found if line.startswith(refused)]
    assert "unreachable=0" in done.stdout


@pytest.mark.parametrize("first", [False, True])
def test_a_host_that_is_down_is_left_out_when_asked_unless_others_depend_on_it(tmp_path: Path, first: bool) -> None:
    gone = {"ansible_host": "127.0.0.1", "ansible_port": 1, "ictx_address": "192.0.2.9"}
    groups = {"slurm_controller": ["gone", "here"]} if first else {}
    done = preflight(tmp_path, "--extra-vars", "ictx_skip_unreachable=true", groups=groups, gone=gone)
    output = done.stdout + done.stderr
    if first:
        assert done.returncode == 2
        assert "host gone: cannot be reached, and not be left out: it is the first of slurm_controller" in output
    else:
        assert done.returncode == 4, output
        assert re.search(r"^gone .* unreachable=1 .*failed=0", output, re.MULTILINE)
        assert re.search(r"^here .* unreachable=0 .*failed=0", output, re.MULTILINE)


def test_a_host_whose_address_cannot_be_evaluated_is_reported_with_the_rest(tmp_path: Path) -> None:
    done = preflight(tmp_path, gone={"ansible_host": "{{ nowhere }}"}, slurm_kill_wait="soon")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "nothing was changed, problems: 2\n" in output
    assert "- ansible_host (gone): cannot be evaluated: 'nowhere' is undefined\n" in output
    assert output.count("[ERROR]") == 1, "the host is reported once, without a connection attempt"


class Registry(BaseHTTPRequestHandler):
    """Responds as a registry whose only user is robot$ictx."""

    def do_GET(self) -> None:
        """Accepts the user's credentials and rejects all others."""
        right = base64.b64encode(b"robot$ictx:right").decode()
        self.send_response(200 if self.headers.get("Authorization") == f"Basic {right}" else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Suppresses the log of requests."""


def test_a_registry_that_somebody_else_runs_must_let_its_users_in(tmp_path: Path) -> None:
    certificate = [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        "key.pem",
        "-out",
        "ca.pem",
    ]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        *certificate,
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for name in ("right", "wrong"):
        (tmp_path / name).write_text(f"{name}\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    with ThreadingHTTPServer(("localhost", 0), Registry) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        registry = f"localhost:{server.server_port}"
        pulls = {"user": "robot$ictx", "password_file": str(tmp_path / "right"), "ca_file": str(tmp_path / "ca.pem")}
        pushes = {"push_user": "pusher", "push_password_file": str(tmp_path / "wrong")}
        given: dict[str, Any] = {"groups": {"registry": []}, "ictx_registry": registry}
        done = preflight(tmp_path, **given, ictx_registry_external=pulls)
        assert done.returncode == 0, done.stdout + done.stderr
        done = preflight(tmp_path, **given, ictx_registry_external=pulls | pushes)
        server.shutdown()
    output = done.stdout + done.stderr
    assert "nothing was changed, problems: 1\n" in output
    assert (
        f"- ictx_registry: https://{registry}/v2/ rejects the user pusher (401): correct ictx_registry_external\n"
        in output
    )
    assert "wrong" not in output.replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"status": 200}, ""),
        ({"status": 401}, "rejects anonymous access (401): correct ictx_registry_external"),
        (
            {"status": 401, "www_authenticate": 'Bearer realm="https://x"'},
            "requires tokens (Bearer): use a registry with HTTP basic authentication",
        ),
        (
            {"status": -1, "msg": "Status code was -1 and not [200]: Request failed: <urlopen error refused>"},
            "does not respond like a registry (Request failed: <urlopen error refused>): correct it, or ca_file of "
            "ictx_registry_external",
        ),
    ],
)
def test_what_is_wrong_with_such_a_registry(answer: dict[str, object], text: str) -> None:
    problems = loaded(ROOT / "playbooks/plugins/filter/registries.py").registry_problems
    expected = [f"ictx_registry: https://r:5000/v2/ {text}"] if text else []
    assert problems([answer], {"ictx_registry": "r:5000"}) == expected


def test_versions_that_no_repository_has_are_refused(tmp_path: Path) -> None:
    pins = [{"packages": ["slurmd", "slurm-of-nobody"], "version": "1.0*"}, {"packages": ["bash"], "version": "5*"}]
    done = preflight(tmp_path, common_apt_pins=pins)
    assert done.returncode != 0
    remedy = "pin another version, add a repository, or run apt-get update on the node\n"
    output = done.stdout + done.stderr
    assert re.search(
        rf"- common_apt_pins \(here\): slurmd 1\.0\*: the node's repositories have \d\S+(, \S+)*: {remedy}", output
    )
    absent = "- common_apt_pins (here): slurm-of-nobody 1.0*: the node's repositories do not have the package: "
    assert f"{absent}{remedy}" in output
    assert "bash" not in output


@pytest.mark.lab
@pytest.mark.parametrize("saved", ["test", "hpc"])
def test_a_cluster_with_jobs_is_not_renamed(tmp_path: Path, saved: str) -> None:
    (tmp_path / "clustername").write_text(saved)
    done = preflight(tmp_path, slurm_state_dir=str(tmp_path), ictx_cluster_name="test")
    line = f"- ictx_cluster_name: test: {tmp_path} on here has the state of cluster hpc, with which "
    assert (line in done.stdout + done.stderr) == (saved == "hpc"), done.stdout + done.stderr


def test_the_lab_passes() -> None:
    done = subprocess.run(
        ["ansible-playbook", "playbooks/preflight.yml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.attack(
    "H3",
    "an inventory whose ictx_mlflow_uri is http://",
    before="accepted: passwords of users and of the administrator in clear text on the network",
    now="refused by preflight, unless ictx_mlflow_plain_http accepts it",
)
def test_passwords_in_clear_text_and_promoters_who_are_no_users_are_refused(tmp_path: Path) -> None:
    uri = "http://192.0.2.30:30500"
    done = preflight(tmp_path, ictx_mlflow_uri=uri, ictx_promoters=["eve"])
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "- ictx_mlflow_uri: passwords would be readable on the network: use https://" in output
    assert "- ictx_promoters: eve is not one of ictx_users" in output
    assert preflight(tmp_path, ictx_mlflow_uri=uri, ictx_mlflow_plain_http=True).returncode == 0
    assert preflight(tmp_path, ictx_mlflow_uri="http://127.0.0.1:5000").returncode == 0


def test_more_hardware_than_there_is_is_refused_and_less_is_not(tmp_path: Path) -> None:
    """Compares the inventory with this machine."""
    card = {"name": "nic", "type": "ib", "count": 2, "file": "/dev/nonexistent[0-1]"}
    group = {"name": "big", "nodes": "here", "sockets": 64, "cores_per_socket": 512, "threads_per_core": 1}
    done = preflight(tmp_path, slurm_node_groups=[{**group, "memory_mb": 1 << 30, "gres": [card]}])
    assert done.returncode != 0
    output = done.stdout + done.stderr
    remedy = "correct it, or run playbooks/measure-nodes.yml to write the node's hardware"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    for line in (
        f"memory_mb is 1073741824, but the node has {memory}: {remedy}",
        f"count of nic:ib is 2, but the node has 0: {remedy}",
    ):
        assert f"- slurm_node_groups (here): {line}\n" in output
    assert "- slurm_node_groups (here): cores_per_socket is 512, but the node has " in output

    card = {**card, "count": 1, "file": "/dev/null"}
    less = {"name": "small", "nodes": "here", "cpus": 1, "memory_mb": 64, "gres": [card]}
    done = preflight(tmp_path, slurm_node_groups=[less], slurm_measured_nodes=[{"nodes": "here", "memory_mb": 1 << 30}])
    assert done.returncode == 0, done.stdout + done.stderr


def test_facts_of_packages_and_groups_are_those_of_ansibles_modules() -> None:
    report = """python
system debian 12
package ii  0.5.15-2+b2 munge
package rc  1.0-1 nginx-light
package ii  12 python3-cryptography
group munge:x:110:
group ictx:x:2000:alice,bob
MemTotal: 1 kB"""
    facts = loaded(ROOT / "playbooks/plugins/action/check_node.py").facts
    assert facts(report.splitlines()) == {
        "packages": {
            "munge": [{"name": "munge", "version": "0.5.15-2+b2", "source": "apt"}],
            "python3-cryptography": [{"name": "python3-cryptography", "version": "12", "source": "apt"}],
        },
        "getent_group": {"munge": ["x", "110", ""], "ictx": ["x", "2000", "alice,bob"]},
    }
    assert facts(["python", "group root:x:0:"]) == {}
