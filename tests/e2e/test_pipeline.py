"""The chain of stages in the lab: each a job on what the one before registered, whatever happens; nothing twice."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from lab import ROOT, SHARED, Lab, wait_for

pytestmark = pytest.mark.lab

PIPELINE = "/opt/ictx/bin/ictx-pipeline"
TRAINING = ("extend", "sft", "dpo")
SHORT = ("train.steps=40", "train.checkpoint_every=5", "train.validate_every=40", "train.validation_windows=8")


@pytest.fixture(scope="module")
def stages(lab: Lab) -> dict[str, dict[str, Any]]:
    """The stages that the lab's inventory has, by name."""
    content = json.loads(lab.user("cat /opt/ictx/jobs/stages.json"))
    return {about["name"]: about for about in content["stages"]}


@pytest.fixture(scope="module")
def pretrained(lab: Lab) -> str:
    """The version that the newest job of pretraining registered."""
    for result in sorted(SHARED.glob("runs/researcher/*/result.json"), key=lambda path: -path.stat().st_mtime):
        found = json.loads(result.read_text())
        if found.get("stage", "pretrain") == "pretrain" and found.get("model_version"):
            return f"models:/{found['model_name']}/{found['model_version']}"
    job = lab.submit()
    assert lab.follow(job)[0] == 0
    return f"models:/{lab.result(job)['model_name']}/{lab.result(job)['model_version']}"


class Chain:
    """A pipeline of this test's own, from a version on, with short stages that register nothing for others."""

    def __init__(self, lab: Lab, first: str, last: str, origin: str) -> None:
        self.lab, self.name, self.last = lab, f"test-{time.time_ns()}", last
        names = TRAINING[TRAINING.index(first) : TRAINING.index(last) + 1]
        settings = [f"{first}.init={origin}"]
        settings += [f"{name}.{setting}" for name in names for setting in (*SHORT, "run.model_name=")]
        lab.user(f"{PIPELINE} run --name {self.name} --from {first} --to {last} --set {' --set '.join(settings)}")
        self.jobs = {name: self.record(name)["job"] for name in names}

    def record(self, stage: str) -> dict[str, Any]:
        """Returns what the pipeline's folder keeps of a stage."""
        file = SHARED / "runs/researcher/pipelines" / self.name / f"{stage}.json"
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    def steps(self, stage: str) -> list[int]:
        """Returns the steps that a stage recorded."""
        return [int(record["step"]) for record in self.lab.records(self.jobs[stage])]

    def saved(self, stage: str) -> bool:
        """Returns whether a stage has a checkpoint."""
        return any(self.lab.folder(self.jobs[stage]).glob("checkpoints/step-*"))


def stop(lab: Lab, job: str) -> None:
    """What the controller sends some time before the limit, and to a job that is preempted."""
    lab.user(f"scancel --batch --signal=TERM {job}")


def kill(lab: Lab, _: str) -> None:
    """A rank dies."""
    assert lab.run("n2", "pkill --signal KILL --full 'ictx train'").returncode == 0


def lose(lab: Lab, _: str) -> None:
    """A node is lost."""
    assert lab.run("n2", "systemctl kill --signal=KILL slurmd").returncode == 0


def check_the_chain_ends_well(chain: Chain, fault: Callable[[Lab, str], None]) -> None:
    """Does harm to each stage once it has a checkpoint; each goes on under its number, and what waits for it too."""
    lab = chain.lab
    for stage, job in chain.jobs.items():
        # The stages before are done, or this one waits.
        wait_for(f"a checkpoint of {stage}", lambda stage=stage: chain.saved(stage), 900)
        fault(lab, job)
        status, output = lab.follow(job)
        assert status == 0, output[-3000:]
        assert lab.restarts(job) == 1
        assert 0 < lab.result(job)["resumed_from_step"] < 40
        steps = chain.steps(stage)
        assert steps == sorted(set(steps))
        assert steps[-1] == 40
    assert f"job {chain.jobs[chain.last]}" in lab.user(f"{PIPELINE} status --name {chain.name}")
    # Nothing is left to do.
    again = lab.user(f"{PIPELINE} run --name {chain.name} --to {chain.last}")
    assert {name: chain.record(name)["job"] for name in chain.jobs} == chain.jobs, again


def test_slurm_accepts_the_job_of_every_stage(lab: Lab, stages: dict[str, dict[str, Any]]) -> None:
    for name in stages:
        done = lab.run("ctl", f"sbatch --test-only /opt/ictx/jobs/{name}.sbatch", user="researcher")
        assert done.returncode == 0, f"{name}: {done.stderr}"


def test_a_dry_run_shows_the_chain_and_submits_nothing(lab: Lab, stages: dict[str, dict[str, Any]]) -> None:
    before = lab.user("squeue --me --states=all --noheader --format=%i")
    lines = lab.user(f"{PIPELINE} run --name dry --dry-run").splitlines()
    assert [line.split(".sbatch")[0].rsplit("/", 1)[-1] for line in lines] == list(stages)
    for line, about in zip(lines, stages.values(), strict=True):
        assert f"afterok:JOB-OF-{about['after']} " in line or not about["after"]
    assert lab.user("squeue --me --states=all --noheader --format=%i") == before
    assert not (SHARED / "runs/researcher/pipelines/dry").exists()


@pytest.mark.parametrize("parent", ["../mallory/990001", "990001"])
def test_a_folder_of_another_user_is_no_parent(lab: Lab, parent: str) -> None:
    """What stands there would be loaded."""
    theirs, link = "/shared/runs/mallory/990001", "/shared/runs/researcher/990001"
    lab.run("ctl", f"mkdir -p -m 755 {theirs}; echo '{{}}' >{theirs}/result.json", user="mallory")
    lab.user(f"ln -sfn {theirs} {link}")
    try:
        job = lab.user(f"sbatch --parsable /opt/ictx/jobs/extend.sbatch init=job:{parent}")
        status, output = lab.follow(job)
        assert status == 1, output
        assert re.search(f"init=job:{parent}: (expected|{link} is no folder of this user)", output), output
    finally:
        lab.run("ctl", f"rm -rf {theirs} {link}")


@pytest.mark.full
@pytest.mark.parametrize("fault", [stop, kill, lose])
def test_a_chain_survives_a_fault_in_each_stage(lab: Lab, pretrained: str, fault: Callable[[Lab, str], None]) -> None:
    check_the_chain_ends_well(Chain(lab, "extend", "dpo", pretrained), fault)


@pytest.mark.full
def test_a_stage_that_fails_ends_the_chain_and_the_next_run_mends_it(lab: Lab, pretrained: str) -> None:
    name = f"test-{time.time_ns()}"
    first = f"{PIPELINE} run --name {name} --from extend --to sft --set extend.init={pretrained}"
    wrong = lab.run("ctl", f"{first} --set extend.train.stepz=3 --wait --interval=2", user="researcher")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    last = wrong.stdout.split("[")[-1].splitlines()
    assert [line.split()[-5 if "failed" in line else -4 :] for line in last if "sft" in line or "extend" in line], last
    assert "failed" in next(line for line in last if " extend" in line)
    assert "cancelled" in next(line for line in last if " sft" in line)
    settings = " ".join(
        f"--set {stage}.{setting}" for stage in ("extend", "sft") for setting in (*SHORT, "run.model_name=")
    )
    done = lab.run("ctl", f"{first} {settings} --wait --interval=2", user="researcher")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_the_whole_chain_ends_in_a_served_version_and_a_second_run_does_nothing(lab: Lab) -> None:
    began = time.monotonic()
    run = [ROOT / "scripts/pipeline"]
    first = subprocess.run(run, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-5000:] + first.stderr[-2000:]
    took = time.monotonic() - began
    shown = dict(re.findall(r"(\w+) +done +job \d+ +models:/ictx-tiny/(\d+)", first.stdout))
    assert set(shown) == {"pretrain", "extend", "sft", "dpo", "eval", "judge", "promote"}
    assert len({shown[name] for name in ("pretrain", *TRAINING)}) == 4
    assert {shown[name] for name in ("eval", "judge", "promote")} == {shown["dpo"]}
    check_lineage(lab, shown)
    second = subprocess.run(run, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout[-5000:]
    assert "submitted job" not in second.stdout
    print(f"the whole chain: {took:.0f} s")


def check_lineage(lab: Lab, versions: dict[str, str]) -> None:
    """Every version names its stage and its parent; the last one has its evaluations and is the champion."""
    script = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
model = client.get_registered_model("ictx-tiny")
print(json.dumps({
    "champion": str(model.aliases["champion"]),
    "tags": {version: client.get_model_version("ictx-tiny", version).tags for version in sys.argv[1:]},
}))
"""
    done = subprocess.run(
        [ROOT / ".venv-workload/bin/python", "-c", script, *set(versions.values())],
        env={**os.environ, **lab.tracking()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["champion"] == versions["dpo"]
    chain = ["pretrain", *TRAINING]
    for before, stage in itertools.pairwise(chain):
        tags = found["tags"][versions[stage]]
        assert tags["ictx.stage"] == stage
        assert tags["ictx.parent_version"] == f"ictx-tiny/{versions[before]}"
    evaluated = found["tags"][versions["dpo"]]
    assert {"ictx.eval.perplexity", "ictx.eval.needle_nats", "ictx.data_fingerprint"} <= evaluated.keys()
