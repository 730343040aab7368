"""A job from sbatch to the registered model, and its recovery from a lost node and from the time limit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, SHARED, Lab, wait_for

pytestmark = pytest.mark.lab

STEPS_OF_A_SHORT_RUN = 75
SHORT = [
    f"train.steps={STEPS_OF_A_SHORT_RUN}",
    "train.checkpoint_every=10",
    "train.validate_every=25",
    "run.model_name=",
]


@pytest.fixture(scope="session")
def trained(lab: Lab) -> str:
    """A job that ran to its end: the newest one of `make lab`, else a new one."""
    results = sorted(SHARED.glob("runs/researcher/*/result.json"), key=lambda path: path.stat().st_mtime)
    contents = {path.parent.name: json.loads(path.read_text()) for path in results}
    pretrained = {job: about for job, about in contents.items() if about.get("stage", "pretrain") == "pretrain"}
    registered = [job for job, about in pretrained.items() if about["model_name"]]
    # The folders of a previous lab remain, but not its accounting records.
    known = [job for job in registered if lab.accounts(job, "State") == "COMPLETED"]
    if known:
        return known[-1]
    job = lab.submit()
    status, output = lab.follow(job)
    assert status == 0, output[-3000:]
    return job


@pytest.fixture(scope="session")
def registry(trained: str, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The job's MLflow run and registered version with its files, read with MLflow's client."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    script = """
import json, sys
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
client = MlflowClient()
version = client.get_model_version_by_alias(sys.argv[1], "candidate")
run = client.get_run(sys.argv[2])
print(json.dumps({
    "version": version.version, "run_id": version.run_id, "tags": run.data.tags, "status": run.info.status,
    "artifacts": download_artifacts(f"models:/{sys.argv[1]}/{version.version}", dst_path=sys.argv[3]),
    "losses": [metric.value for metric in client.get_metric_history(sys.argv[2], "validation_loss")],
}))
"""
    result = lab.result(trained)
    done = subprocess.run(
        [ROOT / ".venv-workload/bin/python", "-c", script, result["model_name"], result["mlflow_run_id"], artifacts],
        env={**os.environ, **lab.tracking()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def test_the_job_completed_on_both_nodes(lab: Lab, trained: str) -> None:
    assert lab.accounts(trained, "State,NodeList") == "COMPLETED|n[1-2]"


def test_the_model_learned_what_frequencies_do_not_tell(lab: Lab, trained: str) -> None:
    result = lab.result(trained)
    assert 5 < result["unigram_entropy"] < 9
    assert result["val_loss"] < 0.85 * result["unigram_entropy"]


def test_the_corpus_is_real_and_large_enough(lab: Lab, trained: str) -> None:
    data = SHARED / "data" / (lab.folder(trained) / "data").readlink().name
    assert json.loads((data / "meta.json").read_text())["corpus_bytes"] >= 20_000_000


def test_the_registered_version_is_the_exported_model(lab: Lab, trained: str, registry: dict[str, Any]) -> None:
    result = lab.result(trained)
    assert registry["run_id"] == result["mlflow_run_id"]
    assert str(registry["version"]) == result["model_version"]
    assert registry["status"] == "FINISHED"
    assert registry["losses"][-1] == pytest.approx(result["val_loss"])
    artifacts = Path(registry["artifacts"])
    exported = lab.folder(trained) / "export"
    assert json.loads((artifacts / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (artifacts / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_the_run_is_tagged_with_the_image_that_the_registry_has(lab: Lab, registry: dict[str, Any]) -> None:
    digest = registry["tags"]["ictx.image_digest"]
    known = {path.name for path in (SHARED / "images" / "training").iterdir()}
    assert digest.removeprefix("sha256:") in known
    reference = registry["tags"]["ictx.image_ref"]
    assert reference.endswith(f"@{digest}")
    address, name = reference.split("@")[0].split("/", 1)
    password = (SHARED.parent / "secrets" / "registry_password").read_text().strip()
    request = f"https://{address}/v2/{name}/manifests/{digest}"
    headers = lab.run(
        "ctl",
        f"curl --silent --head --cacert /dev/stdin --user ictx:{password} "
        f"--header 'Accept: application/vnd.docker.distribution.manifest.v2+json' {request} <<'PEM'\n"
        + (SHARED.parent / "ca" / "ca.crt").read_text()
        + "PEM",
    ).stdout
    assert f"docker-content-digest: {digest}" in headers.lower()


@pytest.mark.full
def test_a_job_that_loses_a_node_resumes_and_its_curve_goes_on(lab: Lab, trained: str) -> None:
    job = lab.submit("pretrain/tiny.yaml", *SHORT)
    lab.wait_in(job, "the second checkpoint", lambda: (lab.folder(job) / "checkpoints" / "step-00000020").exists())
    assert lab.run("n2", "systemctl kill --signal=KILL slurmd").returncode == 0
    status, output = lab.follow(job)
    assert status == 0, output[-3000:]
    assert lab.restarts(job) >= 1
    assert_resumed(lab, job)
    # The node returned without help: the second start ran on it, and it accepts new jobs.
    assert lab.accounts(job, "NodeList") == "n[1-2]"
    assert lab.user("srun --nodelist=n2 --immediate=120 hostname") == "n2"


@pytest.mark.full
def test_a_cancelled_job_does_not_start_again(lab: Lab, trained: str) -> None:
    job = lab.submit("--nodes=1", "pretrain/tiny.yaml", "train.steps=100000", "run.model_name=")
    lab.wait_in(job, "the first record", lambda: len(lab.records(job)) > 0)
    lab.user(f"scancel {job}")
    wait_for("the job's end", lambda: not lab.user(f"squeue --noheader --jobs={job}"), 180)
    assert lab.accounts(job, "State").startswith("CANCELLED")
    assert lab.restarts(job) == 0
    assert lab.folder(job).with_name(f"{job}.log").read_text().endswith("] cancelled\n")
    assert not (SHARED / "bundles/researcher" / job).exists()


def assert_resumed(lab: Lab, job: str) -> None:
    """The run resumed from a checkpoint: every step is recorded once, and the loss continues to fall."""
    assert 0 < lab.result(job)["resumed_from_step"] < STEPS_OF_A_SHORT_RUN
    records = lab.records(job)
    steps = [int(record["step"]) for record in records]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS_OF_A_SHORT_RUN
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.full
def test_an_empty_corpus_is_named(lab: Lab, trained: str) -> None:
    lab.user("mkdir -p /shared/runs/researcher/nothing")
    drafts = set((SHARED / "data").glob(".*.part"))
    job = lab.user("ICTX_CORPUS=/shared/runs/researcher/nothing sbatch --parsable /opt/ictx/jobs/pretrain.sbatch")
    status, output = lab.follow(job)
    assert status == 1
    assert "corpus path /shared/runs/researcher/nothing is empty" in output
    assert not (lab.folder(job) / "data").exists()
    assert set((SHARED / "data").glob(".*.part")) == drafts


@pytest.mark.full
def test_an_unknown_setting_is_named_before_anything_is_trained(lab: Lab, trained: str) -> None:
    job = lab.submit("pretrain/tiny.yaml", "train.stepz=3")
    status, output = lab.follow(job)
    assert status == 1
    assert "unknown setting train.stepz: did you mean train.steps?" in output
