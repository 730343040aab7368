"""The pipeline in the lab: each stage is a job on the version of the stage before, recovers, and repeats no work."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from lab import ROOT, SHARED, Lab, wait_for
from recovery import Drill
from test_lifecycle import PREFIX, states

pytestmark = pytest.mark.lab

PIPELINE = "/opt/ictx/bin/ictx-pipeline"
TRAINING = ("pretrain", "extend", "sft", "dpo")
STAGES = (*TRAINING, "eval", "judge", "promote")
COMPUTE = ("n1", "n2")
MODEL = "ictx-tiny"
"""The model that the lab's stages register. Others may be trained too briefly for the gate of `promote`."""
SHORT = ("train.steps=40", "train.checkpoint_every=5", "train.validate_every=40", "train.validation_windows=8")


@pytest.fixture(scope="module")
def stages(lab: Lab) -> dict[str, dict[str, Any]]:
    """The stages of the lab's inventory, by name."""
    content = json.loads(lab.user("cat /opt/ictx/jobs/stages.json"))
    return {about["name"]: about for about in content["stages"]}


@pytest.fixture(scope="module")
def pretrained(lab: Lab) -> str:
    """The version of MODEL that the newest job of pretraining registered."""
    for result in sorted(SHARED.glob("runs/researcher/*/result.json"), key=lambda path: -path.stat().st_mtime):
        found = json.loads(result.read_text())
        own = found.get("stage", "pretrain") == "pretrain" and found.get("model_name") == MODEL
        if own and found.get("model_version"):
            return f"models:/{MODEL}/{found['model_version']}"
    job = lab.submit()
    assert lab.follow(job)[0] == 0
    assert lab.result(job)["model_name"] == MODEL
    return f"models:/{MODEL}/{lab.result(job)['model_version']}"


class Chain:
    """A pipeline of this test with short stages, which registers no versions of MODEL.

    Args:
        origin: the version from which the first stage starts.
        model: the name to register versions under; empty: nothing is registered.
    """

    def __init__(self, lab: Lab, first: str, last: str, origin: str = "", model: str = "") -> None:
        self.lab, self.name, self.last = lab, f"test-{time.time_ns()}", last
        names = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
        settings = [f"{first}.init={origin}"] if origin else []
        trained = [name for name in names if name in TRAINING]
        settings += [f"{name}.{setting}" for name in trained for setting in (*SHORT, f"run.model_name={model}")]
        lab.user(f"{PIPELINE} run --name {self.name} --from {first} --to {last} --set {' --set '.join(settings)}")
        self.jobs = {name: self.record(name)["job"] for name in names}

    def record(self, stage: str) -> dict[str, Any]:
        """Returns the pipeline's record of a stage."""
        file = SHARED / "runs/researcher/pipelines" / self.name / f"{stage}.json"
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    def steps(self, stage: str) -> list[int]:
        """Returns the steps that a stage recorded."""
        return [int(record["step"]) for record in self.lab.records(self.jobs[stage])]

    def samples(self, stage: str) -> list[str]:
        """Returns the finished samples of a stage, each with the name of its evaluation."""
        files = sorted(self.lab.folder(self.jobs[stage]).glob("evals/*/samples.jsonl"))
        return [
            f"{file.parent.name} {json.loads(line)['key']}" for file in files for line in file.read_text().splitlines()
        ]

    def checkpoints(self, stage: str) -> int:
        """Returns the number of checkpoints of a stage."""
        return len(list(self.lab.folder(self.jobs[stage]).glob("checkpoints/step-????????")))

    def under_way(self, stage: str) -> bool:
        """Returns whether a stage has results that its next start must reuse."""
        return bool(self.checkpoints(stage) if stage in TRAINING else self.samples(stage) or stage == "promote")


def ranks(job: str) -> str:
    """Returns a pattern for the processes of a job that compute or promote, without srun and shells."""
    own = f"run[.]dir=/shared/runs/[a-z]+/{job} "
    return f"^[^ ]*python[^ ]* ((-u -m ictx train|[^ ]*/ictx eval) .*{own}|[^ ]*/ictx promote )"


def stop(lab: Lab, job: str, _: str) -> None:
    """Sends the signal that the controller sends before the time limit and on preemption."""
    lab.user(f"scancel --batch --signal=TERM {job}")


def kill(lab: Lab, job: str, node: str) -> None:
    """Kills a rank."""
    assert lab.run(node, f"pkill --signal KILL --full '{ranks(job)}'").returncode == 0


def lose(lab: Lab, _: str, node: str) -> None:
    """Kills slurmd, so that the controller loses the node."""
    assert lab.run(node, "systemctl kill --signal=KILL slurmd").returncode == 0


FAULTS = [
    pytest.param(
        stop,
        marks=pytest.mark.drill(
            "SIGTERM to every stage of a pipeline, one after the other",
            keeps="checkpoints, every step once, finished samples, queued jobs",
            acts="nobody",
        ),
    ),
    pytest.param(
        kill,
        marks=pytest.mark.drill(
            "a rank of every stage is killed",
            keeps="checkpoints, every step once, finished samples, queued jobs",
            acts="nobody",
        ),
    ),
    pytest.param(
        lose,
        marks=pytest.mark.drill(
            "slurmd of a node is killed in every stage",
            keeps="checkpoints, every step once, finished samples, queued jobs",
            acts="nobody",
        ),
    ),
]


@contextmanager
def frozen(lab: Lab, job: str) -> Iterator[None]:
    """Releases a held job of a few seconds, and suspends its processes as they start, until the block ends."""
    stopping = f"until pkill --signal STOP --full '{ranks(job)}'; do sleep 0.05; done"
    with ThreadPoolExecutor() as pool:
        for node in COMPUTE:
            pool.submit(lab.run, node, f'timeout 300 sh -c "{stopping}"')
        lab.user(f"scontrol release {job}")
        try:
            yield
        finally:
            for node in COMPUTE:
                lab.run(node, f"pkill --full '[u]ntil pkill'; pkill --signal CONT --full '{ranks(job)}'")


def harm(chain: Chain, stage: str, fault: Callable[[Lab, str, str], None]) -> None:
    """Injects a fault into a stage, on its last node, after the stage has produced results."""
    lab, job = chain.lab, chain.jobs[stage]
    with frozen(lab, job) if stage == "promote" else nullcontext():
        # The stage starts only after the stages before it.
        wait_for(f"{stage}, job {job}, under way", lambda: chain.under_way(stage), 900)
        wait_for(f"a node of {stage}", lambda: bool(nodes(lab, job)), 900)
        node = nodes(lab, job)[-1]
        found = lab.run(node, f"timeout 300 sh -c \"until pgrep --full '{ranks(job)}' >/dev/null; do sleep 0.1; done\"")
        assert found.returncode == 0, f"no rank of the job on {node}: {lab.folder(job).with_suffix('.log').read_text()}"
        fault(lab, job, node)


def nodes(lab: Lab, job: str) -> list[str]:
    """Returns the nodes on which a job runs."""
    return lab.user(f'scontrol show hostnames "$(squeue --noheader --states=R --jobs={job} --format=%N)"').split()


def waits(lab: Lab, job: str) -> bool:
    """Returns whether a job is in the queue without running."""
    return bool(lab.user(f"squeue --me --noheader --states=PENDING,COMPLETING --format=%i | grep -x {job} || true"))


def check_the_chain_ends_well(
    chain: Chain, *faults: Callable[[Lab, str, str], None], drill: Drill | None = None
) -> None:
    """Injects the faults into each stage; each stage and its dependents complete under their job numbers."""
    lab, drill = chain.lab, drill or Drill()
    if "promote" in chain.jobs:
        lab.user(f"scontrol hold {chain.jobs['promote']}")
    for stage, job in chain.jobs.items():
        finished: list[str] = []
        for number, fault in enumerate(faults):
            wait_for(f"start {number + 1} of {stage}", lambda job=job, number=number: lab.restarts(job) == number, 900)
            harm(chain, stage, fault)
            finished = finished or chain.samples(stage)
            with drill.recovery():
                again = number + 1
                wait_for(f"{stage} again", lambda job=job, n=again: lab.restarts(job) == n and not waits(lab, job), 900)
        status, output = lab.follow(job)
        assert status == 0, output[-3000:]
        assert lab.restarts(job) == len(faults)
        if stage in TRAINING:
            assert 0 < lab.result(job)["resumed_from_step"] < 40
            steps = chain.steps(stage)
            assert steps == sorted(set(steps))
            assert steps[-1] == 40
        else:
            samples = chain.samples(stage)
            assert len(samples) == len(set(samples))
            assert not finished or "of them finished before" in output
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
    # SLURM removes ended jobs from the queue meanwhile (MinJobAge).
    after = lab.user("squeue --me --states=all --noheader --format=%i")
    assert set(after.split()) <= set(before.split())
    assert not (SHARED / "runs/researcher/pipelines/dry").exists()


@pytest.mark.parametrize("parent", ["../mallory/990001", "990001"])
def test_a_folder_of_another_user_is_no_parent(lab: Lab, parent: str) -> None:
    """Files in that folder would be loaded, and its owner can change them."""
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


def test_a_stage_is_stopped_and_then_loses_a_rank_and_what_waits_for_it_runs(lab: Lab, pretrained: str) -> None:
    chain = Chain(lab, "extend", "extend", pretrained)
    command = (
        f"sbatch --parsable --dependency=afterok:{chain.jobs['extend']} --kill-on-invalid-dep=yes --output=/dev/null"
    )
    waiting = lab.user(f"{command} --wrap=true")
    check_the_chain_ends_well(chain, stop, kill)
    wait_for("the end of what waited", lambda: lab.accounts(waiting, "State") == "COMPLETED", 60)


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_a_chain_survives_a_fault_in_each_stage(
    lab: Lab, whole: str, pretrained: str, fault: Callable[[Lab, str, str], None], drill: Drill
) -> None:
    check_the_chain_ends_well(Chain(lab, "pretrain", "pretrain"), fault, drill=drill)
    chain = Chain(lab, "extend", "promote", pretrained, f"test-{fault.__name__}")
    check_the_chain_ends_well(chain, fault, drill=drill)


def power(node: str, *words: str) -> None:
    """Cuts or restores the power of a node."""
    subprocess.run(["podman", *words, f"{PREFIX}-{node}"], check=True, capture_output=True)


@pytest.mark.full
@pytest.mark.drill(
    "a node drawn at random loses its power every three minutes while a pipeline runs",
    keeps="every stage, under its job number; every step once",
    acts="nobody",
)
def test_a_chain_ends_though_nodes_die_again_and_again(lab: Lab, pretrained: str, drill: Drill) -> None:
    chain, seed = Chain(lab, "extend", "dpo", pretrained, "test-nodes-die"), time.time_ns()
    print(f"seed {seed}")
    draw, last, deaths = random.Random(seed), chain.jobs["dpo"], 0
    until = time.monotonic() + 5400
    # slurmdbd records a job some seconds after its submission.
    while (lab.accounts(last, "State") or "PENDING").split()[0] not in ("COMPLETED", "FAILED", "CANCELLED"):
        assert time.monotonic() < until, "the chain did not end within 90 minutes"
        time.sleep(180)
        node = draw.choice(COMPUTE)
        with drill.recovery():
            power(node, "kill", "--signal=KILL")
            # slurmctld detects a reboot by the boot time, which a container shares with its host: wait for the timeout.
            wait_for(f"{node} down", lambda node=node: states(lab)[node].startswith("down"), 120)
            power(node, "start")
            wait_for(f"{node} in service", lambda node=node: states(lab)[node] in ("idle", "mixed", "allocated"), 300)
        deaths += 1
    assert deaths
    for stage, job in chain.jobs.items():
        assert lab.accounts(job, "State,ExitCode") == "COMPLETED|0:0", stage
        steps = chain.steps(stage)
        assert steps == sorted(set(steps))
        assert steps[-1] == 40


@pytest.mark.full
def test_a_stage_that_fails_ends_the_chain_and_the_next_run_completes_it(lab: Lab, pretrained: str) -> None:
    name = f"test-{time.time_ns()}"
    first = f"{PIPELINE} run --name {name} --from extend --to sft --set extend.init={pretrained}"
    wrong = lab.run("ctl", f"{first} --set extend.train.stepz=3 --wait --interval=2", user="researcher")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    last = wrong.stdout.split("\npipeline ")[-1].splitlines()
    assert "failed" in next(line for line in last if " extend" in line)
    assert "cancelled" in next(line for line in last if " sft" in line)
    settings = " ".join(
        f"--set {stage}.{setting}" for stage in ("extend", "sft") for setting in (*SHORT, "run.model_name=")
    )
    done = lab.run("ctl", f"{first} {settings} --wait --interval=2", user="researcher")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(lab: Lab) -> str:
    """The output of a successful `make pipeline`: all stages are complete, and the judge is available."""
    done = subprocess.run([ROOT / "scripts/pipeline"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout[-500:])
    return done.stdout


@pytest.mark.full
def test_the_whole_chain_ends_in_a_served_version_and_a_second_run_does_nothing(lab: Lab, whole: str) -> None:
    shown = dict(re.findall(rf"(\w+) +done +job \d+ +models:/{MODEL}/(\d+)", whole))
    assert set(shown) == set(STAGES)
    assert len({shown[name] for name in TRAINING}) == 4
    assert {shown[name] for name in ("eval", "judge", "promote")} == {shown["dpo"]}
    check_lineage(lab, shown)
    second = subprocess.run([ROOT / "scripts/pipeline"], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout[-5000:]
    assert "submitted job" not in second.stdout


def check_lineage(lab: Lab, versions: dict[str, str]) -> None:
    """Every version has its stage and parent as tags; the last one has evaluations and the alias `champion`."""
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
    for before, stage in itertools.pairwise(TRAINING):
        tags = found["tags"][versions[stage]]
        assert tags["ictx.stage"] == stage
        assert tags["ictx.parent_version"] == f"ictx-tiny/{versions[before]}"
    evaluated = found["tags"][versions["dpo"]]
    assert {"ictx.eval.perplexity", "ictx.eval.needle_nats", "ictx.data_fingerprint"} <= evaluated.keys()
