"""Drills of lost services, each restored by one documented command while jobs run."""

from __future__ import annotations

import datetime
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from helm import program
from lab import ROOT, SHARED, STATE, Lab, wait_for
from recovery import Drill
from serving import MODEL, NAMESPACE, Client, serves
from test_drills_slurm import GO, end, on, state, training
from test_lifecycle import PREFIX, played, waiting
from test_rotation import basic, secret, status
from test_serving import Registry
from test_training import assert_resumed

pytestmark = [pytest.mark.lab, pytest.mark.full]

NODES = ("ctl", "n1", "n2", "svc1", "kube1")


def accounted(lab: Lab) -> set[str]:
    """Returns the accounting records of ended jobs, and the accounts, one line each."""
    ended = "--state=BF,CA,CD,F,NF,OOM,TO --starttime=2020-01-01 --endtime=now"
    jobs = f"sacct --allusers --noheader --allocations --parsable2 --format=jobid,user,state,exitcode {ended}"
    # The database accepts connections a moment after its start.
    accounts = on(lab, "ctl", "timeout 60 sh -c 'until sacctmgr --noheader --parsable2 list account; do sleep 1; done'")
    return {*on(lab, "ctl", jobs).splitlines(), *accounts.splitlines()}


@pytest.mark.drill(
    "the accounting database is dropped",
    keeps="every account and completed job in the backup; running jobs",
    acts="ansible-playbook playbooks/restore.yml -e restore_what=accounting",
)
def test_a_lost_database_is_restored_while_a_job_runs(lab: Lab, drill: Drill) -> None:
    job = waiting(lab, "n1", GO)
    before = accounted(lab)
    on(lab, "ctl", "systemctl start ictx-backup")
    on(lab, "ctl", "systemctl stop slurmdbd && mariadb --execute='drop database slurm_acct_db'")
    on(lab, "ctl", "systemctl start slurmdbd")
    assert not before <= accounted(lab)
    with drill.recovery():
        played("playbooks/restore.yml", "-e", "restore_what=accounting")
        wait_for("the accounts", lambda: before <= accounted(lab), 120)
    assert (state(lab, job), lab.restarts(job)) == ("RUNNING", 0)
    end(lab, job)


@pytest.mark.drill(
    "the controller's state is deleted",
    keeps="running jobs, without a restart; the queue in the backup",
    acts="ansible-playbook playbooks/restore.yml -e restore_what=slurm-state",
)
def test_a_lost_queue_is_restored_while_a_job_runs(lab: Lab, drill: Drill) -> None:
    job = waiting(lab, "n1", GO)
    held = lab.user("cd /tmp && sbatch --parsable --hold --output=/dev/null --wrap=true")
    # The controller writes its state within five seconds.
    time.sleep(7)
    on(lab, "ctl", "systemctl start ictx-backup")
    on(lab, "ctl", "systemctl stop slurmctld && find /var/lib/slurm/slurmctld -type f -delete")
    with drill.recovery():
        played("playbooks/restore.yml", "-e", "restore_what=slurm-state")
        on(lab, "ctl", "timeout 60 sh -c 'until scontrol ping | grep -q UP; do sleep 1; done'")
    assert [state(lab, one) for one in (job, held)] == ["RUNNING", "PENDING"]
    assert lab.restarts(job) == 0
    end(lab, job)
    lab.user(f"scancel {held}")
    on(lab, "ctl", "rm -r /var/lib/slurm/slurmctld.before-*")


def images() -> dict[str, str]:
    """Returns the digest of each image that jobs or pods use."""
    files = {name: STATE / f"images/{name}.json" for name in ("mlflow", "serving")}
    files["training"] = SHARED / "images/training/current/image.json"
    return {name: json.loads(file.read_text())["digest"] for name, file in files.items()}


def kept(lab: Lab) -> dict[str, bool]:
    """Returns whether the registry has each of these images."""
    accept = "Accept: application/vnd.docker.distribution.manifest.v2+json"
    ask = f"curl --silent --head --fail --cacert /etc/ictx/tls/ca.crt --header '{accept}'"
    user = f"--user ictx:{secret('registry_password')} https://{lab.address('svc1')}:5000/v2/ictx"
    return {
        name: lab.run("svc1", f"{ask} {user}/{name}/manifests/{digest}").returncode == 0
        for name, digest in images().items()
    }


@pytest.mark.drill(
    "the registry's storage is deleted",
    keeps="every image that jobs and pods use; every request of a steady client",
    acts="ansible-playbook playbooks/images.yml",
)
def test_a_lost_registry_gets_its_images_again(lab: Lab, steady: Client, drill: Drill) -> None:
    on(lab, "svc1", "systemctl stop docker-registry && find /var/lib/docker-registry -mindepth 1 -delete")
    on(lab, "svc1", "systemctl start docker-registry")
    wait_for("the registry", lambda: lab.run("svc1", "ss -ltn | grep -q :5000").returncode == 0, 30)
    assert not any(kept(lab).values())
    with drill.recovery():
        played("playbooks/images.yml")
    assert all(kept(lab).values())
    assert steady.failures == []


def expired(certificate: x509.Certificate) -> bytes:
    """Returns a copy of a certificate of the lab's authority that expired yesterday."""
    authority = serialization.load_pem_private_key((STATE / "ca/ca.key").read_bytes(), None)
    yesterday = datetime.datetime.now().astimezone() - datetime.timedelta(days=1)
    made = x509.CertificateBuilder(
        certificate.issuer,
        certificate.subject,
        certificate.public_key(),
        x509.random_serial_number(),
        yesterday - datetime.timedelta(days=30),
        yesterday,
        list(certificate.extensions),
    )
    return made.sign(authority, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]


@pytest.mark.drill(
    "the registry's certificate has expired",
    keeps="images; no client continues without verification",
    acts="ansible-playbook playbooks/registry.yml",
)
def test_an_expired_certificate_is_refused_and_issued_anew(lab: Lab, drill: Drill) -> None:
    file, url = "/etc/docker/registry/tls/registry.crt", f"https://{lab.address('svc1')}:5000/v2/"

    def answer() -> int:
        return status(url, basic("ictx", secret("registry_password")))

    current = x509.load_pem_x509_certificate(on(lab, "svc1", f"cat {file}").encode())
    # Written in place to keep owner and mode.
    on(lab, "svc1", f"cat >{file} <<'PEM'\n{expired(current).decode()}PEM")
    on(lab, "svc1", "systemctl restart docker-registry")
    time.sleep(3)
    assert answer() == 0
    with drill.recovery():
        played("playbooks/registry.yml")
        wait_for("the registry", lambda: answer() == 200, 60)


def command(*words: object) -> str:
    """Returns the output of a command, which must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout[-4000:]}{done.stderr[-2000:]}"
    return done.stdout


def kubectl(*words: str) -> str:
    """Returns the output of kubectl."""
    return command("kubectl", f"--kubeconfig={STATE}/kubeconfig", f"--namespace={NAMESPACE}", *words)


def upgrade(*settings: str) -> None:
    """Upgrades MLflow's release as its README describes."""
    words = [word for setting in settings for word in ("--set", setting)]
    place = ["--kubeconfig", STATE / "kubeconfig", "--namespace", NAMESPACE, "--wait", "--timeout", "10m"]
    command(program(), "upgrade", "ictx-mlflow", ROOT / "charts/mlflow", "--reuse-values", *words, *place)


def backup(folder: Path, job: str) -> None:
    """Runs MLflow's backup now.

    Equivalent to `kubectl create job --from=cronjob/ictx-mlflow-backup`, which does not support CronJobs of the lab's
    Kubernetes 1.20.
    """
    template = json.loads(kubectl("get", "cronjob", "ictx-mlflow-backup", "--output=json"))["spec"]["jobTemplate"]
    file = folder / f"{job}.json"
    file.write_text(json.dumps({"apiVersion": "batch/v1", "kind": "Job", **template, "metadata": {"name": job}}))
    kubectl("delete", "job", job, "--ignore-not-found")
    kubectl("create", f"--filename={file}")
    kubectl("wait", "--for=condition=complete", "--timeout=10m", f"job/{job}")


@pytest.fixture
def backed_up(tmp_path: Path) -> Iterator[None]:
    """Enables and makes a backup of MLflow; disables backups afterwards, as in the lab's inventory."""
    upgrade("backup.enabled=true", "backup.size=5Gi")
    backup(tmp_path, "drill-backup")
    yield
    kubectl("delete", "job", "drill-backup")
    played("playbooks/mlflow.yml")
    kubectl("delete", "persistentvolumeclaim", "ictx-mlflow-backup", "--ignore-not-found")


TRACKED = """
import hashlib, pathlib, tempfile
from mlflow.artifacts import download_artifacts
experiments = client.search_experiments()
runs = [run for one in experiments for run in client.search_runs([one.experiment_id], max_results=10000)]
models = client.search_registered_models()
versions = client.search_model_versions(max_results=10000)
print(json.dumps({
    "runs": sorted([run.info.run_id, run.info.status, sorted(run.data.metrics.items())] for run in runs),
    "aliases": sorted([model.name, sorted(model.aliases.items())] for model in models),
    "versions": sorted([one.name, str(one.version), one.source, sorted(one.tags.items())] for one in versions),
    "files": {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in [pathlib.Path(download_artifacts(f"models:/{sys.argv[1]}@champion", dst_path=tempfile.mkdtemp()))]
        for path in folder.rglob("*") if path.is_file()
    },
}))
"""


@pytest.mark.drill(
    "MLflow's volume is emptied: database and artifacts",
    keeps="every run, metric, version, alias and file of the backup; every request of a steady client",
    acts="helm upgrade ictx-mlflow charts/mlflow --reuse-values --set restore.snapshot=latest",
)
def test_a_lost_mlflow_is_restored_while_its_model_is_served(
    lab: Lab, steady: Client, backed_up: None, drill: Drill
) -> None:
    before = Registry().run(TRACKED, MODEL)
    assert before["runs"]
    assert before["files"]
    kubectl("scale", "deployment", "ictx-mlflow", "--replicas=0")
    kubectl("rollout", "status", "deployment", "ictx-mlflow", "--timeout=120s")
    volume = kubectl("get", "persistentvolumeclaim", "ictx-mlflow-data", "--output=jsonpath={.spec.volumeName}")
    folder = kubectl("get", "persistentvolume", volume, "--output=jsonpath={.spec.local.path}")
    assert folder.startswith("/srv/pv/")
    on(lab, "kube1", f"find {folder} -mindepth 1 -delete")
    with drill.recovery():
        upgrade("restore.snapshot=latest")
        kubectl("wait", "--for=condition=complete", "--timeout=15m", "job/ictx-mlflow-restore-latest")
        upgrade("restore.snapshot=")
        wait_for("MLflow", lambda: status(f"{lab.tracking()['MLFLOW_TRACKING_URI']}/health", "") == 200, 300)
    assert Registry().run(TRACKED, MODEL) == before
    assert steady.failures == []


@pytest.mark.drill(
    "the machine of the Kubernetes node is replaced; its data volumes are kept",
    keeps="MLflow's runs, versions and files; the served version",
    acts="make lab",
)
def test_a_kubernetes_node_is_made_anew_on_its_volumes(lab: Lab, drill: Drill) -> None:
    before = Registry().run(TRACKED, MODEL)
    command("podman", "rm", "--force", "--time=5", f"{PREFIX}-kube1")
    assert not serves()
    with drill.recovery():
        command(ROOT / "scripts/lab")
        wait_for("an answer", serves, 600)
    found = Registry().run(TRACKED, MODEL)
    # `make lab` evaluates the model again, which adds a run and changes tags of the version.
    assert all(run in found["runs"] for run in before["runs"])
    assert [version[:3] for version in found["versions"]] == [version[:3] for version in before["versions"]]
    assert (found["aliases"], found["files"]) == (before["aliases"], before["files"])


@pytest.mark.drill(
    "the power of every machine is cut while a job trains, and comes back",
    keeps="the job, every step once; accounts; MLflow's runs and versions; images; the served version",
    acts="nobody",
)
def test_everything_comes_back_after_a_power_cut(lab: Lab, drill: Drill) -> None:
    tracked, accounts = Registry().run(TRACKED, MODEL), accounted(lab)
    job = training(lab)
    checkpoints = lab.folder(job) / "checkpoints"
    lab.wait_in(job, "two checkpoints", lambda: len(list(checkpoints.glob("step-????????"))) >= 2)
    machines = [f"{PREFIX}-{node}" for node in NODES]
    command("podman", "kill", "--signal=KILL", *machines)
    assert not serves()
    with drill.recovery():
        command("podman", "start", *machines)
        wait_for("the controller", lambda: lab.run("ctl", "scontrol ping | grep -q UP").returncode == 0, 300)
        wait_for("the job again", lambda: lab.restarts(job) > 0 and state(lab, job) in ("RUNNING", ""), 600)
        wait_for("an answer", serves, 600)
    exit_status, output = lab.follow(job)
    assert exit_status == 0, output[-3000:]
    assert_resumed(lab, job)
    assert accounts <= accounted(lab)
    found = Registry().run(TRACKED, MODEL)
    assert {name: found[name] for name in ("aliases", "versions", "files")} == {
        name: tracked[name] for name in ("aliases", "versions", "files")
    }
    assert status(f"https://{lab.address('svc1')}:5000/v2/", basic("ictx", secret("registry_password"))) == 200
    assert all(kept(lab).values())
