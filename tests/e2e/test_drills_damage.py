"""Drills of damaged or lost data: an image layer, a model file, a Kubernetes node with its volumes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client
from lab import STATE, Lab, wait_for
from recovery import Drill
from serving import MODEL, NAMESPACE, Client, serves
from test_drills_restore import TRACKED, backed_up, backup, command, images, kept, kubectl, upgrade
from test_drills_slurm import GO, end, on, state
from test_lifecycle import PREFIX, played, waiting
from test_rotation import secret, status
from test_serving import Registry, core, last_words

__all__ = ["backed_up", "core"]
"""Fixtures that other modules of drills define."""

pytestmark = [pytest.mark.lab, pytest.mark.full]

STORAGE = "/var/lib/docker-registry/docker/registry/v2/blobs/sha256"


def file_of(digest: str) -> str:
    """Returns the file of a blob on the registry's host."""
    name = digest.removeprefix("sha256:")
    return f"{STORAGE}/{name[:2]}/{name}/data"


def base_layer(lab: Lab) -> str:
    """Returns the digest of the first layer of the training image, which others share."""
    manifest = json.loads(on(lab, "svc1", f"cat {file_of(images()['training'])}"))
    return str(manifest["layers"][0]["digest"])


def pull(lab: Lab, image: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Pulls an image on this machine, with none of its layers in podman's storage."""
    certificates = folder / "certificates"
    certificates.mkdir()
    shutil.copy(STATE / "ca/ca.crt", certificates)
    registry = f"{lab.address('svc1')}:5000"
    login = ["podman", "login", "--cert-dir", certificates, "--authfile", folder / "auth.json", "--username", "ictx"]
    subprocess.run([*login, "--password-stdin", registry], input=secret("registry_password"), text=True, check=True)
    options = ["--cert-dir", certificates, "--authfile", folder / "auth.json", "--quiet"]
    # podman limits --runroot to 50 characters, and pytest's folders are longer.
    with tempfile.TemporaryDirectory(prefix="run-") as run:
        words = ["podman", "--root", folder / "root", "--runroot", run, "pull", *options, f"{registry}/{image}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        subprocess.run(["umount", folder / "root/overlay"], stderr=subprocess.DEVNULL, check=False)
    return done


@pytest.mark.drill(
    "a layer that the images share is damaged in the registry's storage",
    keeps="every image, under its digest; running jobs; requests of a steady client; no client gets the damaged layer",
    acts="ansible-playbook playbooks/images.yml",
)
def test_a_damaged_layer_is_refused_and_replaced(lab: Lab, steady: Client, drill: Drill, tmp_path: Path) -> None:
    job, before, layer = waiting(lab, "n1", GO), images(), base_layer(lab)
    # Changes the time in gzip's header: the layer still unpacks, but has another digest.
    on(lab, "svc1", f"printf DRIL | dd of={file_of(layer)} bs=1 seek=4 conv=notrunc status=none")
    refused = pull(lab, f"ictx/training@{before['training']}", tmp_path)
    assert refused.returncode != 0
    assert re.search(r"[Dd]igest did not match", refused.stderr), refused.stderr[-2000:]
    with drill.recovery():
        found = played("playbooks/images.yml")
    assert f"{layer} is damaged, in" in " ".join(found.split())
    assert f"sha256:{on(lab, 'svc1', f'sha256sum {file_of(layer)}').split()[0]}" == layer
    assert images() == before
    assert all(kept(lab).values())
    assert (state(lab, job), lab.restarts(job)) == ("RUNNING", 0)
    end(lab, job)
    assert steady.failures == []


def volume(claim: str) -> str:
    """Returns the folder of a claim on the Kubernetes node."""
    name = kubectl("get", "persistentvolumeclaim", claim, "--output=jsonpath={.spec.volumeName}")
    folder = kubectl("get", "persistentvolume", name, "--output=jsonpath={.spec.local.path}")
    assert folder.startswith("/srv/pv/")
    return folder


def restore() -> None:
    """Restores MLflow from its newest backup, as the chart's README describes, and waits until it answers."""
    upgrade("restore.snapshot=latest")
    kubectl("wait", "--for=condition=complete", "--timeout=15m", "job/ictx-mlflow-restore-latest")
    upgrade("restore.snapshot=")
    wait_for("MLflow", lambda: status(f"{Lab().tracking()['MLFLOW_TRACKING_URI']}/health", "") == 200, 300)


@pytest.mark.drill(
    "a file of the served model is damaged on MLflow's volume, and its pod is replaced",
    keeps="every request of a steady client; every file of the version; no pod serves the damaged file",
    acts="helm upgrade ictx-mlflow charts/mlflow --reuse-values --set restore.snapshot=latest",
)
def test_a_damaged_model_file_is_refused_and_restored(
    lab: Lab, steady: Client, backed_up: None, core: client.CoreV1Api, drill: Drill
) -> None:
    before = Registry().run(TRACKED, MODEL)
    (name,) = [name for name in before["files"] if name.endswith(".safetensors")]
    find = f"find {volume('ictx-mlflow-data')} -type f -name {shlex.quote(Path(name).name)} -exec sha256sum {{}} +"
    files = [line.split(maxsplit=1)[1] for line in on(lab, "kube1", find).splitlines() if before["files"][name] in line]
    assert files
    for file in map(shlex.quote, files):
        # Changes one byte, but neither size nor time.
        damage = f"printf X | dd of={file} bs=1 seek=100000 conv=notrunc status=none"
        on(lab, "kube1", f"touch -r {file} /tmp/then && {damage} && touch -r /tmp/then {file}")
    kubectl("rollout", "restart", "deployment/ictx-serving")
    wait_for("the refusal", lambda: any("does not have the checksum" in one for one in last_words(core, NAMESPACE)))
    assert serves()
    with drill.recovery():
        restore()
        kubectl("rollout", "status", "deployment/ictx-serving", "--timeout=15m")
    assert Registry().run(TRACKED, MODEL) == before
    assert steady.answered > 0
    assert steady.failures == []


ELSEWHERE = """\
apiVersion: v1
kind: PersistentVolume
metadata: {name: drill-elsewhere}
spec:
  capacity: {storage: 5Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  claimRef: {namespace: NAMESPACE, name: drill-elsewhere}
  hostPath: {path: /shared/drill-backup, type: Directory}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: drill-elsewhere, namespace: NAMESPACE}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  volumeName: drill-elsewhere
  resources: {requests: {storage: 5Gi}}
"""


def elsewhere(folder: Path) -> None:
    """Creates a volume claim for backups on the shared directory, and configures MLflow to use it."""
    file = folder / "elsewhere.yml"
    file.write_text(ELSEWHERE.replace("NAMESPACE", NAMESPACE))
    kubectl("apply", f"--filename={file}")
    upgrade("backup.enabled=true", "backup.existingClaim=drill-elsewhere")


@pytest.fixture
def backed_up_elsewhere(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """Makes a backup of MLflow outside of the Kubernetes node; disables backups afterwards."""
    on(lab, "kube1", "install -d -o 10001 -g 10001 -m 0700 /shared/drill-backup")
    elsewhere(tmp_path)
    backup(tmp_path, "drill-elsewhere")
    yield tmp_path
    kubectl("delete", "job", "drill-elsewhere", "--ignore-not-found")
    played("playbooks/mlflow.yml")
    kubectl("delete", "persistentvolumeclaim", "drill-elsewhere")
    kubectl("delete", "persistentvolume", "drill-elsewhere")
    on(lab, "kube1", "rm -r /shared/drill-backup")


@pytest.mark.drill(
    "the Kubernetes node is lost with its volumes",
    keeps="every run, metric, version, alias and file of MLflow's backup; the served version",
    acts="ansible-playbook site.yml; helm upgrade ictx-mlflow charts/mlflow --reuse-values "
    "--set restore.snapshot=latest; ansible-playbook playbooks/serving.yml",
)
def test_a_kubernetes_node_that_is_lost_with_its_volumes_is_restored(
    lab: Lab, backed_up_elsewhere: Path, drill: Drill
) -> None:
    before = Registry().run(TRACKED, MODEL)
    command("podman", "rm", "--force", "--time=5", f"{PREFIX}-kube1")
    # Mounts of the kubelet.
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((each for each in mounts if each.startswith(f"{STATE}/kube1/")), reverse=True):
        command("umount", "--lazy", mount)
    shutil.rmtree(STATE / "kube1")
    assert not serves()
    played("playbooks/lab.yml")  # The new machine.
    with drill.recovery():
        played("site.yml")
        elsewhere(backed_up_elsewhere)
        restore()
        played("playbooks/serving.yml")
        wait_for("an answer", serves, 600)
    assert Registry().run(TRACKED, MODEL) == before
