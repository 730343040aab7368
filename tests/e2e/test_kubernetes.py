"""The lab's Kubernetes with an ordinary chart: images from the registry, Services, DNS, volumes, and a reboot."""

from __future__ import annotations

import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from helm import program
from kubernetes import client, config
from lab import ROOT, STATE, Lab, wait_for
from recovery import Drill
from serving import serves

pytestmark = [pytest.mark.lab, pytest.mark.full]

KUBECONFIG = STATE / "kubeconfig"
NAMESPACE = "proof"
TEXT = "served from a volume"
# Settings of the whole machine, which kubelet would set to 1, 10 and 1.
SYSCTLS = ["/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops"]


def run(*command: object) -> str:
    """Returns the output of a command, which must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def helm(*arguments: object) -> str:
    """Returns the output of helm."""
    return run(program(), *arguments, "--kubeconfig", KUBECONFIG, "--namespace", NAMESPACE)


@pytest.fixture(scope="module")
def core() -> client.CoreV1Api:
    """Returns a client of the API with the users' kubeconfig."""
    config.load_kube_config(str(KUBECONFIG))
    return client.CoreV1Api()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pushes an image of Debian's static busybox to the registry; returns its reference by digest."""
    folder = tmp_path_factory.mktemp("image")
    ssh = run("ssh", "-G", "-F", STATE / "ssh/config", "svc1")
    registry = next(line.split()[1] for line in ssh.splitlines() if line.startswith("hostname ")) + ":5000"
    name = f"{registry}/ictx/proof"
    run("mmdebstrap", "--quiet", "--variant=extract", "--include=busybox-static", "bookworm", folder / "root.tar")
    run("podman", "import", "--quiet", folder / "root.tar", name)
    (folder / "ca.crt").write_text((STATE / "ca/ca.crt").read_text())
    credentials = f"ictx:{(STATE / 'secrets/registry_password').read_text().strip()}"
    options = ["--quiet", "--cert-dir", folder, "--creds", credentials, "--digestfile", folder / "digest"]
    run("podman", "push", *options, name)
    run("podman", "rmi", name)
    return f"{name}@{(folder / 'digest').read_text()}"


@pytest.fixture(scope="module")
def url(image: str, core: client.CoreV1Api, lab: Lab) -> Iterator[str]:
    """Installs the chart and yields the URL of its page; removes the release and its volume afterwards."""
    values = ["--set", f"image={image}", "--set", f"text={TEXT}"]
    chart = ROOT / "tests/e2e/proof-chart"
    helm("upgrade", "--install", "proof", chart, *values, "--create-namespace", "--wait", "--timeout", "5m")
    node = core.list_node().items[0]
    address = next(entry.address for entry in node.status.addresses if entry.type == "InternalIP")
    yield f"http://{address}:{core.read_namespaced_service('proof', NAMESPACE).spec.ports[0].node_port}/"
    folders = {volume.spec.local.path for volume in core.list_persistent_volume().items if ours(volume)}
    assert folders
    helm("uninstall", "proof", "--wait")
    wait_for("the volume's end", lambda: not any(map(ours, core.list_persistent_volume().items)), 120)
    assert [path for path in folders if lab.run("kube1", f"test -e {path}").returncode == 0] == []
    core.delete_namespace(NAMESPACE)


def ours(volume: Any) -> bool:
    """Returns whether a volume belongs to the release."""
    return bool(volume.spec.claim_ref.namespace == NAMESPACE)


def page(url: str) -> str:
    """Returns the page's text, or the error."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    except (OSError, urllib.error.URLError) as error:
        return str(error)


def test_a_chart_serves_from_a_volume_as_an_ordinary_user(url: str, core: client.CoreV1Api) -> None:
    assert page(url) == TEXT
    pod = core.list_namespaced_pod(NAMESPACE, label_selector="app=proof").items[0]
    assert "@sha256:" in pod.status.container_statuses[0].image_id


def test_pods_find_each_other_by_name(url: str) -> None:
    assert "Phase:          Succeeded" in helm("test", "proof", "--timeout", "2m")


def test_the_machine_is_not_touched(url: str, lab: Lab) -> None:
    # The node has files mounted over these: kubelet reads the values that it needs and cannot write the kernel's.
    for file in SYSCTLS:
        assert lab.run("kube1", f"mountpoint --quiet {file}").returncode == 0, file
    assert lab.run("kube1", "cat " + " ".join(SYSCTLS)).stdout.split() == ["1", "10", "1"]
    assert lab.run("kube1", "ip route get 169.254.169.254").returncode != 0


def test_credentials_are_private(lab: Lab) -> None:
    assert KUBECONFIG.stat().st_mode & 0o777 == 0o600
    files = "/etc/containerd/config.toml /etc/kubernetes/pki/*.key /etc/kubernetes/pki/*.conf"
    assert set(lab.run("kube1", f"stat --format=%a {files}").stdout.split()) == {"600"}


@pytest.mark.drill("the Kubernetes node is restarted", keeps="releases, volumes, addresses", acts="nobody")
def test_a_reboot_of_the_node_brings_the_page_back(url: str, drill: Drill) -> None:
    node = f"{os.environ.get('ICTX_LAB_NAME', 'ictx')}-kube1"
    run("podman", "stop", "--time", 60, node)
    assert page(url) != TEXT
    with drill.recovery():
        run("podman", "start", node)
        wait_for("the page", lambda: page(url) == TEXT, 300)
        wait_for("an answer of the served model", serves, 600)
