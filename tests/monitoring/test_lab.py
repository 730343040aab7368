"""The lab's monitoring: access control, and the contents of a support bundle."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest
from lab import ROOT, STATE, Lab, wait_for
from roles.test_redaction import LINES, M3

pytestmark = pytest.mark.lab

PORTS = {
    "node_exporter": ("n1", 9100),
    "Prometheus": ("svc1", 9090),
    "Alertmanager": ("svc1", 9093),
    "MariaDB": ("ctl", 9104),
}
NODES = re.findall(r"^Host (\w+)$", (STATE / "ssh/config").read_text(), re.M) if STATE.exists() else []
SECRETS = {
    path.name: path.read_text().split(" salt=")[0].strip()
    for path in (STATE / "secrets").glob("*")
    if path.name != "web_salt"
}
# Not searched: kernel and packages, layers of images, and pods' volumes, which are in folders that only root can enter.
SKIPPED = (
    "/proc /sys /dev /usr /var/lib/containerd /var/lib/docker /var/lib/kubelet/pods /run/containerd /shared/images"
)
# Values are read from stdin, so that no secret is on a command line.
SEARCH = f"""umask 077; cat >/run/secret-values
find / \\( {" -o ".join(f"-path {path}" for path in SKIPPED.split())} \\) -prune -o -type f -perm /0037 -print0 |
  xargs -0 grep --no-messages --fixed-strings --files-with-matches --file=/run/secret-values
rm -f /run/secret-values"""


@pytest.fixture(scope="module")
def lab() -> Lab:
    """The running lab that `make lab` provisioned."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()


@pytest.mark.parametrize("name", PORTS)
def test_nobody_reads_metrics_without_tls_and_a_password(lab: Lab, name: str) -> None:
    node, port = PORTS[name]
    ask = "curl --silent --output /dev/null --write-out '%{http_code}' --cacert /etc/ictx/tls/ca.crt"
    assert lab.run("svc1", f"{ask} https://{node}:{port}/metrics").stdout == "401"
    assert lab.run("svc1", f"{ask} --user metrics:wrong https://{node}:{port}/metrics").stdout == "401"
    assert lab.run("svc1", f"{ask} http://{node}:{port}/metrics").stdout == "400"


@pytest.mark.attack(
    "L",
    "the password of exporters is tried on Prometheus and Alertmanager",
    before="it was accepted by both; every node had the same hash",
    now="it is accepted by exporters only; each host has a different hash",
)
@pytest.mark.parametrize("name", PORTS)
def test_the_password_of_exporters_opens_exporters_only(lab: Lab, name: str) -> None:
    node, port = PORTS[name]
    ask = "curl --silent --output /dev/null --write-out '%{http_code}' --cacert /etc/ictx/tls/ca.crt"
    login = '--user "metrics:$(cat /etc/prometheus/metrics_password)"'
    expected = "401" if name in ("Prometheus", "Alertmanager") else "200"
    assert lab.run("svc1", f"{ask} {login} https://{node}:{port}/metrics").stdout == expected


def test_no_two_hosts_have_the_same_hash_of_a_password(lab: Lab) -> None:
    found = [lab.run(node, "grep -h metrics: /etc/prometheus/node_exporter_web.yml").stdout for node in NODES]
    assert len(set(found)) == len(NODES)


# Units that start containers or users' jobs; tests/templates/test_units.py gives the reasons.
OPEN = {"slurmd", "kubelet", "kube-proxy", "kube-lab-prepare", "kube-lab-addons", "kube-lab-dns"}


@pytest.mark.parametrize("node", NODES)
def test_units_of_ours_are_shut_in_as_systemd_sees_them(lab: Lab, node: str) -> None:
    ours = "grep -l 'Ansible managed' /etc/systemd/system/*.service /etc/systemd/system/*.service.d/*.conf"
    units = set(re.findall(r"/system/([\w@-]+)\.service", lab.run(node, ours).stdout)) - OPEN
    assert "prometheus-node-exporter" in units
    # systemd rates an instance of a template unit.
    names = " ".join(f"{unit}x.service" if unit.endswith("@") else f"{unit}.service" for unit in units)
    rated = lab.run(node, f"for unit in {names}; do systemd-analyze security --no-pager $unit | tail -n 1; done").stdout
    levels = dict(re.findall(r"level for (\S+): ([\d.]+)", rated))
    assert len(levels) == len(units), rated
    assert {unit: level for unit, level in levels.items() if float(level) > 4.0} == {}


@pytest.mark.parametrize("node", NODES)
def test_no_secret_lies_in_a_file_more_open_than_0640(node: str) -> None:
    assert len(SECRETS) > 8
    done = subprocess.run(
        ["ssh", "-F", STATE / "ssh/config", node, "--", SEARCH],
        input="".join(f"{value}\n" for value in SECRETS.values()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_no_secret_lies_in_an_open_file_of_the_control_host() -> None:
    open_ones = [path for path in (STATE / "secrets").iterdir() if path.stat().st_mode & 0o077]
    assert open_ones == []
    for path in STATE.glob("*"):
        if path.is_file() and path.stat().st_mode & 0o037:
            assert not [name for name, value in SECRETS.items() if value in path.read_text()], path


def test_prometheus_may_read_kubernetes_and_do_nothing_there(lab: Lab) -> None:
    settings = json.loads(lab.run("svc1", "cat /etc/prometheus/kubernetes/lab.json").stdout)

    def status(path: str, method: str = "GET") -> str:
        # The API server indents its output for curl's user agent, which crashes Kubernetes 1.20 built with Go 1.19.
        ask = "curl --user-agent test --silent --output /dev/null --write-out '%{http_code}'"
        key = f"--cacert {settings['ca_file']} --header \"Authorization: Bearer $(cat {settings['token_file']})\""
        return lab.run("svc1", f"{ask} --request {method} {key} {settings['api_server']}{path}").stdout

    allowed = ["/metrics", "/api/v1/nodes", "/api/v1/namespaces/ictx/pods"]
    assert {path: status(path) for path in allowed} == dict.fromkeys(allowed, "200")
    namespace = "/api/v1/namespaces/ictx"
    forbidden = [f"{namespace}/secrets", "/api/v1/namespaces/kube-system/pods", "/api/v1/nodes/kube1/proxy/metrics"]
    forbidden += [f"{namespace}/pods/p/exec?command=id", f"{namespace}/pods/p/log", "/api/v1/secrets"]
    assert {path: status(path) for path in forbidden} == dict.fromkeys(forbidden, "403")
    assert status(f"{namespace}/pods/p/proxy/", "POST") == status(f"{namespace}/pods/p", "DELETE") == "403"


def test_a_line_of_a_compute_node_is_in_the_central_logs(lab: Lab) -> None:
    tag = f"test-{uuid.uuid4().hex[:8]}"
    assert lab.run("n1", f"logger --tag {tag} hello").returncode == 0
    read = f"journalctl --directory=/var/log/journal/remote --quiet --output=cat _HOSTNAME=n1 --identifier={tag}"
    wait_for("the line's arrival", lambda: lab.run("svc1", read).stdout == "hello\n", 60)


@M3
def test_a_support_bundle_has_every_node_and_no_secret(lab: Lab, tmp_path: Path) -> None:
    planted = uuid.uuid4().hex
    # Secrets in lines of a log; logger parses `<` at the start of a line as a priority.
    lines = [
        line.replace("§", planted) for line in LINES if "\n  " not in line and ":  " not in line and line[0] != "<"
    ]
    say = f"printf '%s\\n' {shlex.join(lines)} | logger --tag planted"
    assert lab.run("n1", say, user="mallory").returncode == 0
    bundle = tmp_path / "bundle.tar.gz"
    done = subprocess.run(
        [ROOT / ".venv/bin/ansible-playbook", "playbooks/support-bundle.yml", "-e", f"support_bundle_file={bundle}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert bundle.stat().st_mode & 0o077 == 0
    with tarfile.open(bundle) as archive:
        texts = {member.name: archive.extractfile(member).read().decode() for member in archive if member.isfile()}
    assert {name.split("/")[0] for name in texts} >= {"ctl", "n1", "n2", "svc1", "kube1"}
    assert "StoragePass=[" in texts["ctl/configuration.txt"]
    assert "slurmctld" in texts["ctl/services.txt"]
    assert len(texts["n1/journal.txt"]) > 1000
    assert texts["n1/journal.txt"].count(" planted[") > 20
    for name, value in {**SECRETS, "planted": planted}.items():
        holders = [member for member, text in texts.items() if value in text]
        assert holders == [], f"{name} is in {holders}"
