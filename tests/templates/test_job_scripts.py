"""The scripts of SLURM's jobs: their requests, and the behaviour if ranks are killed or fail."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted

# Stubs of SLURM's and the bundle's commands: the ranks run the script `inside`, and end with `status`.
COMMANDS = {
    "srun": 'case "$*" in *"data prepare"*) exit 0;; esac; sh ./inside; exit "$(cat status)"',
    "scontrol": """case $1 in
requeue) echo requeued >queue; kill -TERM "$PPID" ;;
show) [ "$2" != job ] && echo n1 || cat job ;;
*) echo NodeAddr=192.0.2.1 ;;
esac""",
    "ictx-bundle": "exit 0",
}


@cache
def scripts(inventory: str, host: str) -> dict[str, str]:
    """Returns the job script of each stage, with the stages of the other inventory too."""
    stages = {
        "promote-128k": {"kind": "promote", "after": "judge", "alias": "long", "time": "00:05:00"},
        "judge": {"config": "eval/b.yaml", "after": "eval"},
        "eval": {"config": "eval/a.yaml", "after": "dpo"},
        "extend": {"config": "extend/a.yaml", "after": "pretrain"},
        "sft": {"config": "sft/a.yaml", "after": "extend", "settings": ["train.steps=887", "a=b*"]},
        "dpo": {"config": "dpo/a.yaml", "after": "sft"},
    }
    cluster = Cluster(ROOT / "inventories" / inventory, {"slurm_jobs_stages": stages, "ictx_state_dir": "/nonexistent"})
    role, play, _ = next(use for use in cluster.uses("site.yml") if use[0].get_name() == "slurm_jobs")
    variables = cluster.variables(host, play, role)
    ordered = Templar(cluster.loader, variables=variables).template(trusted("{{ _slurm_jobs_stages }}"))
    template = ROOT / "roles/slurm_jobs/templates/stage.sbatch.j2"
    return {about["name"]: cluster.render(template, {**variables, "item": about}) for about in ordered}


def script_of(name: str, inventory: str, host: str) -> str:
    """Renders a job script that does not belong to a stage."""
    cluster = Cluster(ROOT / "inventories" / inventory, {"ictx_state_dir": "/nonexistent"})
    role, play, _ = next(use for use in cluster.uses("site.yml") if use[0].get_name() == "slurm_jobs")
    return cluster.render(ROOT / f"roles/slurm_jobs/templates/{name}.sbatch.j2", cluster.variables(host, play, role))


@pytest.mark.parametrize(("inventory", "host", "ranks"), [("example", "login1", True), ("lab", "ctl", False)])
def test_the_script_of_sweeps_is_an_array_of_workers(inventory: str, host: str, ranks: bool, tmp_path: Path) -> None:
    script = script_of("sweep", inventory, host)
    found = options(script)
    assert (found["array"], found["nodes"]) == ("1-2", "1")
    assert ("--nproc-per-node=4" in script) == ranks == ("gpus-per-node" in found)
    check(tmp_path / "sweep", script)


@pytest.mark.parametrize(("inventory", "host", "gpus"), [("example", "login1", True), ("lab", "ctl", False)])
def test_the_script_that_validates_nodes_measures_every_gpu(
    inventory: str, host: str, gpus: bool, tmp_path: Path
) -> None:
    script = script_of("validate", inventory, host)
    assert ("--nproc-per-node=4" in script) == gpus == ("for gpu in {0..3}" in script)
    assert "--master-port" not in script
    assert "--rdzv-id" not in script
    check(tmp_path / "validate", script)


def check(file: Path, script: str) -> None:
    """Fails if shellcheck reports a problem, except conditions that are constant after rendering."""
    file.write_text(script)
    command = ["shellcheck", "--shell=bash", "--exclude=SC2050,SC2194", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def options(script: str) -> dict[str, str]:
    """Returns the #SBATCH options of a script."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script, re.MULTILINE))


def test_the_job_script_requests_what_the_inventory_has() -> None:
    example = options(scripts("example", "login1")["pretrain"])
    assert example.items() >= {"nodes": "4", "gpus-per-node": "4", "partition": "batch", "time": "1-00:00:00"}.items()
    lab = options(scripts("lab", "ctl")["pretrain"])
    assert lab["nodes"] == "2"
    assert "gpus-per-node" not in lab


def test_stages_are_in_order_and_what_does_not_train_is_one_task() -> None:
    found = {name: options(script) for name, script in scripts("example", "login1").items()}
    assert list(found) == ["pretrain", "extend", "sft", "dpo", "eval", "judge", "promote-128k"]
    single = {name: about["nodes"] for name, about in found.items() if about["nodes"] != "4"}
    assert single == {"eval": "1", "judge": "1", "promote-128k": "1"}
    assert found["promote-128k"]["time"] == "00:05:00"
    assert {name: about["job-name"] for name, about in found.items()} == dict(zip(found, found, strict=True))


def test_settings_of_the_inventory_come_before_those_of_the_command_line() -> None:
    found = scripts("example", "login1")
    assert "\nsettings=(train.steps=887 'a=b*' \"$@\")\n" in found["sft"]
    assert '\nsettings=("$@")\n' in found["dpo"]


@pytest.mark.parametrize(("inventory", "host"), [("example", "login1"), ("lab", "ctl")])
def test_every_stage_s_script_is_sound(inventory: str, host: str, tmp_path: Path) -> None:
    for name, script in scripts(inventory, host).items():
        (tmp_path / name).write_text(script)
        assert "{{" not in script
        assert "{%" not in script
    # Conditions may be constant after rendering.
    command = ["shellcheck", "--shell=bash", "--exclude=SC2050,SC2194", *sorted(tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_others_may_not_know_is_on_no_command_line_of_a_job_script() -> None:
    for name, script in scripts("example", "login1").items():
        assert "--master-port" not in script, name
        assert "--rdzv-id" not in script, name
        assert not re.search(r"^[^#]*\bsource ", script, re.MULTILINE), "passwords must be read inside the container"


class Job:
    """A job of the lab's inventory with stubs of SLURM."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.user = folder, pwd.getpwuid(os.getuid()).pw_name
        self.run = folder / f"runs/{self.user}/17"
        for path in (self.run.parent, folder / f"bundles/{self.user}", folder / "data"):
            path.mkdir(parents=True)
        script = script_of("sweep", "lab", "ctl") if stage == "sweep" else scripts("lab", "ctl")[stage]
        script = script.replace("/opt/ictx/bin/", "").replace("=/shared\n", f"={folder}\n")
        (folder / "script").write_text(script)
        for name, text in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    def controller(self, restarts: int, state: str = "RUNNING", reason: str = "None") -> None:
        """Sets the controller's record of the job, and of the rest of its array."""
        line = "JobId={} JobName=x JobState={} Reason={} Dependency=(null) Requeue=1 Restarts={} BatchFlag=1\n"
        rest = line.format(18, "PENDING", "Resources", 0)
        (self.folder / "job").write_text(rest + line.format(17, state, reason, restarts))

    def start(self, status: int, inside: str = "", restarts: int = 0) -> str:
        """Starts the job, whose ranks run `inside` and end with `status`; returns `requeued` or the job's status."""
        (self.folder / "status").write_text(str(status))
        (self.folder / "inside").write_text(f"run={self.run}\n{inside}\n")
        (self.folder / "queue").write_text("")
        if not (self.folder / "job").exists():
            self.controller(restarts)
        array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
        job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "1"}
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "SLURM_RESTART_COUNT": str(restarts), "USER": self.user}
        done = subprocess.run(
            ["bash", "script", "init=models:/m/3"],
            cwd=self.folder,
            env=array | job | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        print(done.stdout, done.stderr)
        return (self.folder / "queue").read_text().strip() or str(done.returncode)


BEGAN, SAVED = "sleep 0.02; touch $run/about.json", "mkdir -p $run/checkpoints/step-00000005"
ANSWERED = "mkdir -p $run/evals/needle; echo >>$run/evals/needle/samples.jsonl"


@pytest.mark.parametrize(
    ("stage", "status", "inside", "becomes"),
    [
        ("sft", 0, BEGAN, "0"),
        ("sft", 1, "", "1"),
        ("sft", 1, BEGAN, "requeued"),
        ("sft", 137, "", "requeued"),
        ("eval", 137, ANSWERED, "requeued"),
        ("eval", 143, "", "requeued"),
        ("eval", 1, ANSWERED, "1"),
        ("eval", 2, ANSWERED, "2"),
        ("promote-128k", 137, "", "requeued"),
        ("promote-128k", 3, "", "3"),
        ("sweep", 0, "", "0"),
        ("sweep", 1, "", "requeued"),
        ("sweep", 2, "", "2"),
    ],
)
def test_a_job_that_trained_or_was_killed_has_another_start(
    tmp_path: Path, stage: str, status: int, inside: str, becomes: str
) -> None:
    assert Job(tmp_path, stage).start(status, inside) == becomes


def test_a_job_that_saves_nothing_any_more_ends(tmp_path: Path) -> None:
    job = Job(tmp_path, "dpo")
    assert job.start(1, BEGAN) == "requeued"
    assert job.start(1, f"{BEGAN}; {SAVED}", restarts=1) == "requeued"
    assert job.start(1, BEGAN, restarts=2) == "requeued"
    assert job.start(137, restarts=3) == "requeued"
    assert job.start(1, BEGAN, restarts=4) == "1"


def test_a_start_that_does_not_train_is_the_last_one(tmp_path: Path) -> None:
    job = Job(tmp_path, "dpo")
    assert job.start(1, BEGAN) == "requeued"
    assert job.start(1, restarts=1) == "1"


def test_a_job_goes_back_to_the_queue_so_often_and_no_more(tmp_path: Path) -> None:
    job = Job(tmp_path, "extend")
    job.run.mkdir()
    assert job.start(1, BEGAN, restarts=19) == "requeued"
    assert job.start(1, BEGAN, restarts=20) == "1"


@pytest.mark.parametrize("stage", ["sft", "eval", "sweep"])
@pytest.mark.parametrize(
    ("restarts", "state", "reason", "becomes", "bundle"),
    [
        (0, "RUNNING", "None", "requeued", True),  # the grace before the time limit, or before a preemption
        (0, "COMPLETING", "None", "143", False),  # scancel
        (1, "COMPLETING", "None", "143", True),  # scontrol requeue, a preemption, a lost node
        (0, "COMPLETING", "TimeLimit", "requeued", True),  # the grace was too short
    ],
)
def test_a_job_that_was_cancelled_does_not_start_again(
    tmp_path: Path, stage: str, restarts: int, state: str, reason: str, becomes: str, bundle: bool
) -> None:
    """The controller sends SIGTERM to the script in each of these cases."""
    job = Job(tmp_path, stage)
    kept = tmp_path / f"bundles/{job.user}/17"
    job.controller(restarts, state, reason)
    assert job.start(143, f"mkdir -p {kept}; {BEGAN}") == becomes
    assert kept.exists() == bundle


def test_a_folder_that_was_there_before_the_job_is_not_used(tmp_path: Path) -> None:
    job = Job(tmp_path, "extend")
    job.run.mkdir()
    assert job.start(0) == "1"
