"""`playbooks/rotate-secrets.yml` replaces secrets on the running lab without an effect on clients and jobs."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from kubernetes import client, config
from lab import ROOT, STATE, Lab, wait_for
from programs import loaded

pytestmark = pytest.mark.lab
SECRETS = STATE / "secrets"
dashboards = loaded(ROOT / "scripts/dashboards")


def rotated(*arguments: str) -> str:
    """Runs the playbook, which must succeed, and returns its output, which must contain no secret."""
    before = {path.read_text().strip() for path in SECRETS.iterdir()}
    command = [ROOT / ".venv/bin/ansible-playbook", "playbooks/rotate-secrets.yml", "--diff"]
    for argument in arguments:
        command += ["--extra-vars", argument]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    secrets = before | {path.read_text().strip() for path in SECRETS.iterdir()}
    assert [secret[:4] for secret in secrets if len(secret) >= 16 and secret in done.stdout + done.stderr] == []
    return done.stdout


def secret(name: str) -> str:
    """Returns a secret."""
    return (SECRETS / name).read_text().strip()


def status(url: str, authorization: str) -> int:
    """Returns the status of a response; 0 without a response."""
    request = urllib.request.Request(url, headers={"Authorization": authorization})
    context = ssl.create_default_context(cafile=str(STATE / "ca/ca.crt"))
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def basic(user: str, password: str) -> str:
    """Returns the Authorization header of a user and password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@contextmanager
def steady(ask: Callable[[], int]) -> Iterator[list[int]]:
    """Sends requests until the block ends; yields the statuses other than 200."""
    refused: list[int] = []
    asked, ended = threading.Event(), threading.Event()

    def client() -> None:
        while not ended.is_set():
            if (answer := ask()) != 200:
                refused.append(answer)
            asked.set()
            time.sleep(0.2)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        assert asked.wait(60)
        yield refused
    finally:
        ended.set()
        thread.join()


def models(key: str) -> int:
    """Returns the status of a request for the list of models with a key."""
    return status(f"{loaded(ROOT / 'scripts/ask').endpoint()}/v1/models", f"Bearer {key}")


@pytest.mark.attack(
    "M8",
    "The serving key has leaked: it is replaced while clients send requests",
    before="the Secret changed, but pods kept the old key; it could not be revoked",
    now="both keys are accepted until the rotation is finished, then the old one gets 401; no request is lost",
)
@pytest.mark.full
def test_a_serving_key_is_replaced_without_a_lost_request_and_the_database_password_with_it(lab: Lab) -> None:
    old = secret("serving_api_key")
    with steady(lambda: models(old)) as refused:
        printed = rotated("rotate=serving_api_key,slurmdbd_password")
        new = secret("serving_api_key")
        assert new != old
        assert models(new) == 200
    assert refused == []
    assert "-e finish=serving_api_key" in printed
    with steady(lambda: models(new)) as refused:
        rotated("finish=serving_api_key")
        assert models(old) == 401
    assert refused == []
    assert [name for name in ("serving_api_key", "slurmdbd_password") if (SECRETS / f"{name}.previous").exists()] == []
    # sacct queries slurmdbd, which logs in to the database with the new password.
    assert lab.run("ctl", "sacct --noheader --allocations").returncode == 0
    assert f"StoragePass={secret('slurmdbd_password')}\n" in lab.run("ctl", "cat /etc/slurm/slurmdbd.conf").stdout


@pytest.mark.full
def test_a_job_goes_on_while_munge_gets_another_key(lab: Lab) -> None:
    before = lab.run("n1", "sha256sum /etc/munge/munge.key").stdout
    # Its second step starts after the rotation.
    job = lab.user(
        "sbatch --parsable --nodes=2 --output=/dev/null --wrap"
        " 'srun sh -c \"while [ ! -e /shared/runs/researcher/rotated ]; do sleep 1; done\"; srun hostname'"
    )
    flag = STATE / "shared/runs/researcher/rotated"
    flag.unlink(missing_ok=True)
    try:
        wait_for("the job's step", lambda: f"{job}.0" in lab.user(f"squeue --steps --noheader --jobs={job}"))
        rotated("rotate=munge")
    finally:
        flag.touch()
    wait_for("the job's end", lambda: lab.accounts(job, "State") == "COMPLETED", seconds=120)
    flag.unlink()
    assert lab.restarts(job) == 0
    keys = {lab.run(node, "sha256sum /etc/munge/munge.key").stdout for node in ("ctl", "n1", "n2")}
    assert len(keys) == 1
    assert before not in keys
    assert lab.user("srun --nodes=2 true") == ""


@pytest.mark.full
@pytest.mark.attack(
    "M8",
    "The password of MLflow's administrator has leaked: it is replaced while a client uses it",
    before="every playbook that queries MLflow failed without a reason",
    now="both passwords are accepted until all playbooks and programs have the new one, then only the new one",
)
def test_mlflow_passwords_are_replaced_under_a_steady_client(lab: Lab) -> None:
    url = f"{lab.tracking()['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/users/get?username="

    def administrator(password: str) -> int:
        return status(f"{url}admin", basic("admin", password))

    old = {name: secret(name) for name in ("mlflow_admin_password", "mlflow_user_researcher")}
    with (
        steady(lambda: administrator(old["mlflow_admin_password"])) as keeping,
        # Read the password at each request, as playbooks do.
        steady(lambda: administrator(secret("mlflow_admin_password"))) as reading,
    ):
        rotated("rotate=mlflow_admin_password,mlflow_users")
        assert status(f"{url}researcher", basic("researcher", old["mlflow_user_researcher"])) == 200, "of running jobs"
    assert (keeping, reading) == ([], [])
    with steady(lambda: administrator(secret("mlflow_admin_password"))) as refused:
        rotated("finish=mlflow_admin_password,mlflow_users")
    assert refused == []
    assert status(f"{url}admin", basic("admin", old["mlflow_admin_password"])) == 401
    assert status(f"{url}researcher", basic("researcher", old["mlflow_user_researcher"])) == 401
    assert status(f"{url}researcher", basic("researcher", secret("mlflow_user_researcher"))) == 200


@pytest.mark.full
def test_images_are_pulled_with_another_password(lab: Lab) -> None:
    old = secret("registry_password")
    rotated("rotate=registry_password")
    registry = f"{lab.address('svc1')}:5000"
    assert status(f"https://{registry}/v2/", basic("ictx", old)) == 401
    assert status(f"https://{registry}/v2/", basic("ictx", secret("registry_password"))) == 200
    image = json.loads((STATE / "images/mlflow.json").read_text())
    config.load_kube_config(str(STATE / "kubeconfig"))
    core = client.CoreV1Api()
    container = {
        "name": "true",
        "image": f"{image['ref'].split('@')[0]}@{image['digest']}",
        "imagePullPolicy": "Always",
        "command": ["true"],
    }
    pod = {"metadata": {"name": "rotation"}, "spec": {"restartPolicy": "Never", "containers": [container]}}
    core.create_namespaced_pod("default", pod)
    try:
        wait_for(
            "a pod whose image is pulled",
            lambda: core.read_namespaced_pod("rotation", "default").status.phase == "Succeeded",
            seconds=120,
        )
    finally:
        core.delete_namespaced_pod("rotation", "default")


@pytest.mark.full
def test_metrics_are_scraped_with_other_passwords(lab: Lab) -> None:
    prometheus = dashboards.Prometheus.of_lab()
    down = {tuple(sorted(series["metric"].items())) for series in prometheus.instant("up == 0")}
    names = [path.name for path in SECRETS.iterdir() if path.name in NAMES_OF_METRICS]
    rotated(f"rotate={','.join(names)}")
    began = time.time()

    def scraped() -> bool:
        fresh = dashboards.Prometheus.of_lab()
        found = fresh.instant("up == 0")
        latest = fresh.instant("min(timestamp(up))")
        return (
            float(latest[0]["value"][1]) > began
            and {tuple(sorted(series["metric"].items())) for series in found} <= down
        )

    wait_for("every target being scraped", scraped, seconds=180)


NAMES_OF_METRICS = {
    "grafana_query_password",
    "kubernetes_metrics_token",
    "metrics_password",
    "prometheus_password",
    "prometheus_self_password",
    "web_salt",
}


@pytest.mark.full
def test_backups_open_with_another_password_and_keep_what_they_have(lab: Lab) -> None:
    def repository() -> str:
        return str(json.loads(lab.run("ctl", "/opt/ictx/bin/ictx-backup restic cat config").stdout)["id"])

    lab.run("ctl", "systemctl start ictx-backup")
    before = repository()
    rotated("rotate=backup_password")
    assert repository() == before
    assert lab.run("ctl", "cat /etc/ictx/backup/password").stdout.strip() == secret("backup_password")
    snapshots = json.loads(lab.run("ctl", "/opt/ictx/bin/ictx-backup restic snapshots --json").stdout)
    assert {tag for snapshot in snapshots for tag in snapshot["tags"]} == {"accounting", "slurm-state"}
    assert lab.run("ctl", "systemctl start ictx-backup").returncode == 0


@pytest.mark.full
def test_the_authority_is_replaced_while_clients_verify(lab: Lab) -> None:
    first = (STATE / "ca/current.crt").read_text()
    key = secret("serving_api_key")
    # The client reads ca.crt at each connection, as programs on the nodes do.
    with steady(lambda: models(key)) as refused:
        rotated("rotate=authority")
        assert (STATE / "ca/current.crt").read_text() == first
        rotated("rotate=authority")
        assert (STATE / "ca/current.crt").read_text() != first
        rotated("finish=authority")
    assert refused == []
    assert (STATE / "ca/ca.crt").read_text().strip() == (STATE / "ca/current.crt").read_text().strip()
    for node in ("ctl", "n1", "n2", "svc1", "kube1"):
        verified = lab.run(node, "openssl verify -CAfile /etc/ictx/tls/ca.crt /etc/ictx/tls/host.crt")
        assert verified.returncode == 0, f"{node}: {verified.stderr}"
    assert status(f"https://{lab.address('svc1')}:5000/v2/", basic("ictx", secret("registry_password"))) == 200
    assert status(f"{lab.tracking()['MLFLOW_TRACKING_URI']}/health", "") == 200
    prometheus = dashboards.Prometheus.of_lab()
    wait_for("every target being scraped", lambda: prometheus.instant("up == 0") == [], seconds=180)
