"""The jobs that ictx-pipeline submits, and its output. SLURM's commands are stubs; tests/e2e/test_pipeline.py runs the
real pipeline."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT

PROGRAM = ROOT / "roles/slurm_jobs/files/ictx-pipeline"
STAGES = {"pretrain": "", "extend": "pretrain", "sft": "extend", "dpo": "sft", "probe": "pretrain"}
# The queue is a file with lines `JOB STATE`. Each sbatch adds a pending job.
SBATCH = """#!/bin/sh
number=$(($(wc -l <queue) + 11))
echo "$number PENDING" >>queue
echo "$@" >>submitted
echo "$number"
"""
SQUEUE = """#!/bin/sh
while read -r number state; do echo "$number|$state|1:00|(Dependency)"; done <queue
"""
SACCT = """#!/bin/sh
while read -r number state; do echo "$number|$state|00:01:00"; done <old
"""


class Queue:
    """A folder with stubs of SLURM's commands, and the runs of this user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = folder / "runs" / pwd.getpwuid(os.getuid()).pw_name
        self.user.mkdir(parents=True)
        stages = [{"name": name, "after": after} for name, after in STAGES.items()]
        (folder / "stages.json").write_text(json.dumps({"runs": str(folder / "runs"), "stages": stages}))
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "sacct": SACCT}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for name in ("queue", "old", "submitted"):
            (folder / name).touch()

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs the program."""
        return subprocess.run(
            [sys.executable, PROGRAM, *words, f"--jobs={self.folder}"],
            env={"PATH": f"{self.folder}:/usr/bin:/bin"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def submitted(self) -> list[str]:
        """Returns the arguments of each sbatch since the last call."""
        lines = (self.folder / "submitted").read_text().replace(f"{self.folder}/", "").splitlines()
        (self.folder / "submitted").write_text("")
        return lines

    def ends(self, job: int, state: str, **result: Any) -> None:
        """Ends a job, with a result if given."""
        lines = [line for line in (self.folder / "queue").read_text().splitlines() if line.split()[0] != str(job)]
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in [*lines, f"{job} {state}"]))
        if result:
            (self.user / str(job)).mkdir()
            (self.user / str(job) / "result.json").write_text(json.dumps(result))


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    """A queue without jobs."""
    return Queue(tmp_path)


def test_each_stage_waits_for_the_one_whose_model_it_takes(queue: Queue) -> None:
    done = queue("run", "--set", "sft.train.steps=50", "--set", "pretrain.config=pretrain/other.yaml")
    assert done.returncode == 0, done.stderr
    after = "--parsable --dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert queue.submitted() == [
        "--parsable pretrain.sbatch pretrain/other.yaml",
        f"{after.format(11)} extend.sbatch init=job:11",
        f"{after.format(12)} sft.sbatch train.steps=50 init=job:12",
        f"{after.format(13)} dpo.sbatch init=job:13",
        f"{after.format(11)} probe.sbatch init=job:11",
    ]


def test_what_is_done_or_on_its_way_is_not_submitted_again(queue: Queue) -> None:
    queue("run", "--to", "sft")
    assert len(queue.submitted()) == 3
    queue.ends(11, "COMPLETED", model_name="ictx-tiny", model_version="4")
    queue.ends(12, "RUNNING")
    assert queue("run", "--to", "sft").returncode == 0
    assert queue.submitted() == []


def test_a_stage_that_failed_is_submitted_again_with_its_settings_and_then_what_follows(queue: Queue) -> None:
    queue("run", "--to", "sft", "--set", "extend.train.steps=9")
    queue.submitted()
    queue.ends(11, "COMPLETED", model_name="ictx-tiny", model_version="4")
    queue.ends(12, "FAILED")
    queue.ends(13, "CANCELLED")
    assert queue("run", "--to", "sft").returncode == 0
    # Pretraining is complete, so there is no dependency.
    assert queue.submitted() == [
        "--parsable extend.sbatch train.steps=9 init=job:11",
        "--parsable --dependency=afterok:14 --kill-on-invalid-dep=yes sft.sbatch init=job:14",
    ]


def test_from_runs_a_stage_and_what_follows_again_and_nothing_before(queue: Queue) -> None:
    queue("run")
    queue.submitted()
    for job in range(11, 16):
        queue.ends(job, "COMPLETED", model_name="m", model_version=str(job))
    assert queue("run", "--from", "sft").returncode == 0
    assert [line.split(".sbatch")[0].split()[-1] for line in queue.submitted()] == ["sft", "dpo"]


def test_a_chain_begins_with_a_version_that_exists_already(queue: Queue) -> None:
    done = queue("run", "--from", "sft", "--to", "sft")
    assert done.returncode == 2
    assert "sft comes after extend, which is not started" in done.stderr
    assert queue("run", "--from", "sft", "--to", "sft", "--set", "sft.init=models:/ictx-1b/7").returncode == 0
    assert queue.submitted() == ["--parsable sft.sbatch init=models:/ictx-1b/7"]
    # Earlier stages are not submitted.
    queue.ends(11, "COMPLETED", model_name="ictx-1b", model_version="8")
    (queue.folder / "stages.json").write_text(
        json.dumps(
            {
                "runs": str(queue.folder / "runs"),
                "stages": [{"name": "extend", "after": ""}, {"name": "sft", "after": "extend"}],
            }
        )
    )
    assert queue("run").stdout.startswith("extend: not needed, sft began from another model\nsft: done, job 11\n")
    assert queue.submitted() == []


def test_other_settings_run_a_stage_again_unless_its_job_is_on_its_way(queue: Queue) -> None:
    queue("run", "--to", "pretrain")
    queue.submitted()
    done = queue("run", "--to", "pretrain", "--set", "pretrain.train.steps=7")
    assert (done.returncode, queue.submitted()) == (2, [])
    assert "pretrain is waiting as job 11: scancel 11 first" in done.stderr
    queue.ends(11, "COMPLETED", model_name="m", model_version="1")
    queue("run", "--to", "pretrain", "--set", "pretrain.train.steps=7")
    assert queue.submitted() == ["--parsable pretrain.sbatch train.steps=7"]


def test_a_dry_run_prints_commands_and_leaves_nothing(queue: Queue) -> None:
    done = queue("run", "--to", "extend", "--dry-run")
    assert done.stdout.replace(f"{queue.folder}/", "").splitlines() == [
        "sbatch --parsable pretrain.sbatch",
        "sbatch --parsable --dependency=afterok:JOB-OF-pretrain --kill-on-invalid-dep=yes extend.sbatch "
        "init=job:JOB-OF-pretrain",
    ]
    assert queue.submitted() == []
    assert not (queue.user / "pipelines").exists()


def test_the_tree_shows_what_has_become_of_each_stage(queue: Queue) -> None:
    queue("run", "--to", "dpo")
    queue.ends(11, "COMPLETED", model_name="ictx-tiny", model_version="4")
    queue.ends(12, "FAILED")
    (queue.user / "12.log").touch()
    queue.ends(13, "CANCELLED")
    shown = [line.split() for line in queue("status").stdout.splitlines()[1:]]
    assert shown == [
        ["pretrain", "done", "job", "11", "models:/ictx-tiny/4", "1:00"],
        ["├─", "extend", "failed", "job", "12", "FAILED,", f"{queue.user}/12.log"],
        ["│", "└─", "sft", "cancelled", "job", "13", "CANCELLED"],
        ["│", "└─", "dpo", "waiting", "job", "14", "Dependency"],
        ["└─", "probe", "not", "started"],
    ]


def test_states_of_jobs_that_the_controller_forgot_are_those_of_the_accounts(queue: Queue) -> None:
    queue("run", "--to", "pretrain")
    (queue.folder / "queue").write_text("")
    (queue.folder / "old").write_text("11 TIMEOUT\n")
    assert "pretrain" in queue("status").stdout
    assert "TIMEOUT" in queue("status").stdout
    (queue.user / "11").mkdir()
    (queue.user / "11/result.json").write_text("{}")
    assert queue("status").stdout.splitlines()[1].split() == ["pretrain", "done", "job", "11", "1:00"]


def test_waiting_ends_with_the_last_job_and_its_status_says_how(queue: Queue) -> None:
    queue("run", "--to", "pretrain")
    queue.ends(11, "COMPLETED", model_name="m", model_version="1")
    assert queue("run", "--to", "pretrain", "--wait").returncode == 0
    # The stub of squeue does not end jobs by itself.
    (queue.folder / "squeue").write_text("#!/bin/sh\necho '12|FAILED|1:00|(NonZeroExitCode)'\n")
    assert queue("run", "--from", "pretrain", "--to", "pretrain", "--wait").returncode == 1


def test_waiting_prints_a_line_for_each_change_and_the_tree_at_both_ends(queue: Queue) -> None:
    states = "PENDING PENDING PENDING" + " RUNNING" * 9 + " FAILED"
    (queue.folder / "squeue").write_text(f"""#!/bin/sh
set -- {states}
echo >>looks; shift $(($(wc -l <looks) > $# ? $# - 1 : $(wc -l <looks) - 1))
echo "11|$1|1:00|(Priority)"
""")
    (queue.user / "11.log").write_text("step 1/9\rstep\x1b 2/9\nsaved\nstep 3/9")
    done = queue("run", "--to", "pretrain", "--wait", "--interval=0.1")
    lines = [re.sub(r"^\[[0-9:]{8}\] ", "", line) for line in done.stdout.splitlines()]
    assert [line for line in lines if line.startswith("pretrain: ")] == [
        "pretrain: submitted job 11",
        "pretrain: running, job 11",
        "pretrain: step 2/9",
        f"pretrain: failed, job 11, FAILED, {queue.user}/11.log",
    ]
    assert len([line for line in lines if line.startswith("pipeline default")]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--from", "exend"], "no stage 'exend': did you mean extend?"),
        (["run", "--from", "dpo", "--to", "sft"], "--from dpo --to sft: sft does not come after dpo"),
        (["run", "--set", "train.steps=5"], "no stage 'train'"),
        (["run", "--set", "sft.train.steps"], "expected STAGE.SECTION.KEY=VALUE"),
        (["run", "--to", "sft", "--set", "dpo.train.steps=5"], "dpo is not among the stages that run"),
        (["run", "--name", "../x"], "--name '../x': expected letters"),
        (["status", "--name", "other"], "no pipeline other in"),
    ],
)
def test_what_is_wrong_is_named_in_one_line_and_nothing_submitted(queue: Queue, words: list[str], message: str) -> None:
    done = queue(*words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr
    assert queue.submitted() == []


def test_a_refusal_of_slurm_is_shown_in_its_own_words(queue: Queue) -> None:
    (queue.folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    done = queue("run")
    assert done.returncode == 2
    assert "sbatch: error: invalid partition" in done.stderr


def test_a_folder_that_others_can_write_to_is_not_used(queue: Queue) -> None:
    (queue.user / "pipelines").mkdir(mode=0o777)
    (queue.user / "pipelines").chmod(0o777)
    done = queue("run")
    assert (done.returncode, queue.submitted()) == (2, [])
    assert "is not this user's own folder" in done.stderr
