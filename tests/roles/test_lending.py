"""drain.yml, resume.yml and lend.yml on a node of SLURM and Kubernetes, with a real Kubernetes API and SLURM stubs."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from kubernetes_api import api_server, kubectl
from programs import play

pytestmark = pytest.mark.full

# SLURM's nodes and jobs are files in a folder.
SCONTROL = """#!/bin/sh
cd {folder}
case "$*" in
"--oneliner show node "*) echo "NodeName=GPU1 State=$(cat state) Partitions=batch Reason=$(cat reason) [root@x]" ;;
"update NodeName=GPU1 State=DRAIN Reason="*) echo IDLE+DRAIN >state
  for word; do case $word in Reason=*) echo "${{word#Reason=}}" >reason ;; esac; done ;;
"update NodeName=GPU1 State=RESUME") echo IDLE >state; : >reason ;;
"create reservation "* | "delete ReservationName="*) ;;
*) echo "scontrol $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an API server's kubeconfig, an inventory of one node, and stubs of SLURM's programs."""
    made = tmp_path_factory.mktemp("lending")
    groups: dict[str, Any] = {"slurm_compute": {"GPU1": None}, "k3s_agent": {"GPU1": None}, "k3s_server": {}}
    groups |= {"slurm_controller": {"ctl": None}, "storage_client": {}}
    common = {"ansible_connection": "local", "ansible_become": False, "ictx_state_dir": str(made)}
    common |= {"ansible_python_interpreter": sys.executable}
    inventory = {"all": {"vars": common, "children": {name: {"hosts": hosts} for name, hosts in groups.items()}}}
    (made / "hosts.yml").write_text(yaml.safe_dump(inventory))
    for name, text in {"scontrol": SCONTROL.format(folder=made), "squeue": f"#!/bin/sh\ncat {made}/jobs\n"}.items():
        (made / name).write_text(text)
        (made / name).chmod(0o755)
    with api_server(made):
        yield made


def applied(folder: Path, *objects: dict[str, Any]) -> None:
    """Creates or replaces objects."""
    for each in objects:
        text = json.dumps(each)
        subprocess.run([*kubectl(folder), "replace", "--force", "-f-"], input=text, text=True, check=True)


@pytest.fixture
def node(folder: Path) -> Path:
    """A ready node of both schedulers, which runs a pod of a ReplicaSet."""
    for name, text in {"state": "MIXED", "reason": "", "jobs": ""}.items():
        (folder / name).write_text(text)
    status = {"conditions": [{"type": "Ready", "status": "True", "reason": "x", "message": "x"}]}
    applied(folder, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "gpu1"}, "status": status})
    return folder


def pod(folder: Path, name: str, grace: int = 0, **metadata: Any) -> None:
    """Creates a running pod on the node."""
    container = {"name": "x", "image": "x"}
    spec = {"nodeName": "gpu1", "containers": [container], "terminationGracePeriodSeconds": grace}
    about = {"name": name, "namespace": "default", **metadata}
    applied(folder, {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec})


OWNER = {
    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": "1", "controller": True}]
}


def pods(folder: Path) -> list[str]:
    """Returns the pods of the node."""
    done = subprocess.run([*kubectl(folder), "get", "pods", "-oname"], check=True, capture_output=True, text=True)
    return done.stdout.split()


def kubernetes(folder: Path) -> tuple[bool, str]:
    """Returns whether the node is cordoned, and the reason."""
    done = subprocess.run([*kubectl(folder), "get", "node", "gpu1", "-ojson"], check=True, capture_output=True)
    found = json.loads(done.stdout)
    return found["spec"].get("unschedulable", False), found["metadata"].get("annotations", {}).get(
        "ictx/out-of-service", ""
    )


def slurm(folder: Path) -> tuple[str, str]:
    """Returns the node's state and reason in SLURM."""
    return (folder / "state").read_text().strip(), (folder / "reason").read_text().strip()


def played(folder: Path, playbook: str, *words: str, status: int = 0, **variables: Any) -> tuple[int, str]:
    """Runs a playbook on the node; returns the number of changed tasks, and the output."""
    values = {"nodes": "GPU1", "lifecycle_evict_seconds": 20, **variables}
    file = playbook if playbook.endswith(".yml") else f"playbooks/{playbook}.yml"
    done = subprocess.run(
        ["ansible-playbook", "-i", folder / "hosts.yml", file, "-e", json.dumps(values), *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return sum(int(number) for number in re.findall(r" changed=(\d+) ", done.stdout)), " ".join(done.stdout.split())


def test_a_node_is_drained_and_resumed_in_both(node: Path) -> None:
    pod(node, "served", **OWNER)
    assert played(node, "drain", reason="a fan, is noisy")[0] > 0
    assert slurm(node) == ("IDLE+DRAIN", "a fan, is noisy")
    assert kubernetes(node) == (True, "a fan, is noisy")
    assert pods(node) == []
    assert played(node, "drain", reason="other")[0] == 0
    assert kubernetes(node) == (True, "a fan, is noisy")
    refused = played(node, "lend", to="slurm", status=2)[1]
    assert "GPU1 is IDLE+DRAIN in SLURM (a fan, is noisy); GPU1 is cordoned in Kubernetes (a fan, is noisy)" in refused
    assert played(node, "resume")[0] > 0
    assert (slurm(node), kubernetes(node)) == (("IDLE", ""), (False, ""))
    assert played(node, "resume")[0] == 0


def test_a_pod_without_a_controller_keeps_its_node_cordoned(node: Path) -> None:
    pod(node, "bare")
    failed = played(node, "drain", reason="firmware", status=2)[1]
    assert "default/bare" in failed
    assert "The nodes stay cordoned" in failed
    assert kubernetes(node) == (True, "firmware")
    assert pods(node) == ["pod/bare"]
    subprocess.run([*kubectl(node), "delete", "pod", "bare"], check=True)


def test_a_node_whose_machine_failed_can_be_removed(node: Path, tmp_path: Path) -> None:
    """Its pod does not end, since no kubelet runs; the options are those of remove-k3s-node.yml, with shorter times."""
    pod(node, "stuck", grace=1, **OWNER)
    tasks = yaml.safe_load((ROOT / "playbooks/remove-k3s-node.yml").read_text())[0]["tasks"]
    (task,) = (task for task in tasks if task["name"] == "Drain the nodes")
    task["vars"]["_options"] = [
        option.replace("delete-timeout=60", "delete-timeout=1") for option in task["vars"]["_options"]
    ]
    done = play(tmp_path, [task], {"_kubectl": kubectl(node), "remove_gone": ["gpu1"], "evict_minutes": 0.5})
    assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run([*kubectl(node), "delete", "pod", "stuck", "--force", "--grace-period=0"], check=True)
    subprocess.run([*kubectl(node), "uncordon", "gpu1"], check=True)


def test_a_node_is_lent_back_and_forth_and_never_serves_both(node: Path) -> None:
    assert played(node, "lend", "--check", to="kubernetes")[0] > 0
    assert slurm(node) == ("MIXED", "")
    assert played(node, "lend", to="kubernetes")[0] == 1
    assert slurm(node) == ("IDLE+DRAIN", "lend.yml: lent to Kubernetes")
    assert kubernetes(node) == (False, "")
    assert played(node, "lend", to="kubernetes")[0] == 0
    assert played(node, "resume")[0] == 0, "resume.yml does not change a lent node"

    # In the other direction, pods are evicted before jobs are admitted. A job that does not end blocks the return.
    pod(node, "served", **OWNER)
    assert played(node, "lend", "--check", to="slurm")[0] > 0
    assert (pods(node), kubernetes(node)) == (["pod/served"], (False, ""))
    played(node, "lend", to="slurm")
    assert pods(node) == []
    assert kubernetes(node) == (True, "lend.yml: lent to SLURM")
    assert slurm(node) == ("IDLE", "")
    assert played(node, "lend", to="slurm")[0] == 0
    assert played(node, "resume")[0] == 0

    (node / "jobs").write_text("12\n")
    refused = played(node, "lend", to="kubernetes", wait_minutes=0.05, status=2)[1]
    assert "jobs 12 have not ended within 0.05 minutes" in refused
    assert kubernetes(node) == (True, "lend.yml: lent to SLURM"), "jobs still run there"
    (node / "jobs").write_text("")
    played(node, "lend", to="kubernetes")
    assert (slurm(node)[0], kubernetes(node)) == ("IDLE+DRAIN", (False, ""))


PLAY = """
- hosts: GPU1
  gather_facts: false
  vars:
    lifecycle_name: GPU1
    lifecycle_names: [GPU1]
    lifecycle_controller: ctl
    lifecycle_mark: maintain.yml
    lifecycle_reason: "maintain.yml: driver"
    lifecycle_minutes: 0.05
    lifecycle_command: hostname
  tasks:
    - include_tasks: TASKS/whose_node.yml
    - block:
        - include_tasks: TASKS/take_out.yml
        - include_tasks: TASKS/put_back.yml
      rescue:
        - include_tasks: TASKS/keep_out.yml
          vars:
            lifecycle_words: "{{ ansible_failed_result.msg }}"
        - fail: {msg: "{{ lifecycle_mine }}"}
"""


def ends(folder: Path, phase: str) -> None:
    """Ends the pod that validates the node, as the kubelet would."""
    server = yaml.safe_load((folder / "kubeconfig").read_text())["clusters"][0]["cluster"]["server"]
    status = (
        {"phase": phase, "containerStatuses": [], "message": "no device"} if phase == "Failed" else {"phase": phase}
    )
    request = urllib.request.Request(
        f"{server}/api/v1/namespaces/default/pods/ictx-validate-gpu1/status",
        json.dumps({"status": status}).encode(),
        {"Authorization": "Bearer secret", "Content-Type": "application/merge-patch+json"},
        method="PATCH",
    )
    end = time.monotonic() + 200
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, context=ssl._create_unverified_context()):
                return
        except urllib.error.HTTPError:
            time.sleep(0.5)


def test_a_node_is_validated_by_a_pod_and_a_job_and_kept_out_of_both_when_one_fails(node: Path) -> None:
    (node / "images").mkdir(exist_ok=True)
    image = {"ref": "r:5000/ictx/serving@sha256:1", "digest": f"sha256:{'0' * 64}"}
    (node / "images/serving.json").write_text(json.dumps(image))
    (node / "maintain.yml").write_text(PLAY.replace("TASKS", str(ROOT / "playbooks/tasks")))
    (node / "srun").write_text(f'#!/bin/sh\necho "$(cat {node}/state) $*" >{node}/job\n')
    (node / "srun").chmod(0o755)
    playbook = str(node / "maintain.yml")

    with ThreadPoolExecutor() as other:
        other.submit(ends, node, "Failed")
        played(node, playbook, status=2)
    assert slurm(node) == ("IDLE+DRAIN", "maintain.yml failed: the pod is Failed: no device")
    assert kubernetes(node) == (True, "maintain.yml failed: the pod is Failed: no device")
    assert not (node / "job").exists()

    # Another run of the playbook resumes from there.
    with ThreadPoolExecutor() as other:
        other.submit(ends, node, "Succeeded")
        played(node, playbook)
    assert (node / "job").read_text().startswith("IDLE --job-name=ictx-validate --reservation=ictx-validate-GPU1 ")
    assert (slurm(node), kubernetes(node)) == (("IDLE", ""), (False, ""))
    assert pods(node) == []
