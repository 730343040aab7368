"""Jobs write files that attack SLURM's exporter: to disable it, or to make it expose files of other users."""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Iterator

import pytest
from lab import Lab, wait_for

pytestmark = pytest.mark.lab

SECRET = f"secret-{uuid.uuid4().hex}"
# Researcher's job: its metrics must be exposed, and its other file must not.
HONEST = f"""
import os
folder = f"/shared/runs/researcher/{{os.environ['SLURM_JOB_ID']}}"
os.mkdir(folder)
open(f"{{folder}}/metrics.jsonl", "w").write('{{"step": 3, "loss": 1.5}}\\n')
open(f"{{folder}}/notes", "w").write("{SECRET}")
"""
# A task of mallory's array; NOTES is researcher's file, which the exporter's account can read.
EVIL = """
import os
task = int(os.environ["SLURM_ARRAY_TASK_ID"])
folder = f"/shared/runs/mallory/{os.environ['SLURM_JOB_ID']}"
os.mkdir(folder)
os.chdir(folder)
def write(name, text): open(name, "w").write(text)
if task == 0: os.symlink("/dev/zero", "metrics.jsonl")
if task == 1: os.mkfifo("metrics.jsonl")
if task == 2: os.symlink("NOTES", "metrics.jsonl")
if task == 3: write("metrics.jsonl", '{"loss": 1}\\n' + "[" * 10000 + '\\n{"loss": ' + "9" * 400 + "}\\n")
if task == 4:
    write("metrics.jsonl", '{"loss": 2}\\n')
    write("about.json", '{"model": "\\\\ud800\\\\n", "steps": ' + "9" * 400 + "}")
    os.symlink("NOTES", "mlflow_run_id")
    os.symlink("/proc", "checkpoints")
if task == 5:
    write("metrics.jsonl", '{"loss": 3}\\n')
    os.chmod(folder, 0o700)
"""
TASKS = 6


def submit(lab: Lab, user: str, script: str, *options: str) -> str:
    """Submits a small job with a Python script; returns its number."""
    encoded = base64.b64encode(script.encode()).decode()
    small = "--parsable --chdir=/tmp --output=/dev/null --time=2 --mem=50"
    command = f"sbatch {small} {' '.join(options)} --wrap 'echo {encoded} | base64 --decode | python3'"
    done = lab.run("ctl", command, user=user)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def exposed(lab: Lab) -> Iterator[tuple[str, str, str]]:
    """Yields researcher's job, mallory's job, and the metrics of node_exporter after the end of both."""
    honest = submit(lab, "researcher", HONEST)
    notes = f"/shared/runs/researcher/{honest}/notes"
    evil = submit(lab, "mallory", EVIL.replace("NOTES", notes), f"--array=0-{TASKS - 1}")
    # Names in the queue while the exporter reads it.
    forged = rf"x\\n{honest}|{honest}|researcher|2001|batch|RUNNING|9|0|0|None|n1|forged"
    names = [f'--job-name="$(printf "{name}")"' for name in (forged, r"\\377\\033[31m")]
    # The longest name that SLURM accepts, for every task of an array.
    names.append("--array=0-899 --job-name=$(printf %01000d 0)")
    jobs = f"{honest},{evil}"
    try:
        for name in names:
            submit(lab, "mallory", "", "--hold", name)
        wait_for("the jobs' end", lambda: not lab.run("ctl", f"squeue --noheader --jobs={jobs}").stdout, 300)
        # sacct lists it a moment later.
        ended = f"sacct -n -X -j {jobs} -o State%20"
        wait_for("the accounts", lambda: lab.run("ctl", ended).stdout.split() == ["COMPLETED"] * (TASKS + 1), 60)
        started = lab.run("ctl", "systemctl start ictx-slurm-metrics.service")
        assert started.returncode == 0, lab.run("ctl", "journalctl -u ictx-slurm-metrics -n 20").stdout
        read = "curl --silent --fail --cacert /etc/ictx/tls/ca.crt https://ctl:9100/metrics"
        yield honest, evil, lab.run("svc1", f'{read} --user "metrics:$(cat /etc/prometheus/metrics_password)"').stdout
    finally:
        lab.run("ctl", "scancel --user=mallory")


@pytest.mark.attack(
    "H5",
    "her jobs write links, FIFOs, 10,000 brackets, half characters; their names are long, with newlines, no UTF-8",
    before="all metrics of SLURM gone, or slurm_up 0; memory until the exporter was killed",
    now="slurm_up stays 1, researcher's metrics are exposed, invalid rows are counted",
)
def test_every_honest_metric_is_there(exposed: tuple[str, str, str]) -> None:
    honest, _, text = exposed
    assert "\nslurm_up 1\n" in text
    assert "\nnode_textfile_scrape_error 0\n" in text
    assert f'\nictx_training_loss{{job_id="{honest}",stage="",user="researcher"}} 1.5\n' in text
    skipped = {source: float(count) for source, count in re.findall(r'_skipped_rows\{source="(\w+)"\} (\S+)', text)}
    assert skipped["training"] >= 8
    assert skipped["jobs"] == skipped["nodes"] == skipped["accounting"] == 0


@pytest.mark.attack(
    "H5",
    "a link to another user's file, which only the exporter may read, in place of her own file",
    before="its content in a world-readable file",
    now="links are not followed and only files of the job's user are read",
)
def test_nothing_of_another_user_is_exposed(lab: Lab, exposed: tuple[str, str, str]) -> None:
    assert SECRET not in exposed[2]
    assert "forged" not in exposed[2]
    assert lab.run("ctl", f"grep -r {SECRET} /var/lib/ictx-slurm-metrics").returncode == 1


def test_the_exporter_has_limits_and_reads_no_secret_of_monitoring(lab: Lab) -> None:
    show = "systemctl show ictx-slurm-metrics.service --property=User,MemoryMax,TasksMax,TimeoutStartUSec"
    shown = dict(line.split("=", 1) for line in lab.run("ctl", show).stdout.splitlines())
    assert shown == {"User": "ictx-metrics", "MemoryMax": "268435456", "TasksMax": "32", "TimeoutStartUSec": "1min"}
    done = lab.run("ctl", "runuser -u ictx-metrics -- cat /etc/prometheus/node_exporter_web.yml")
    assert "Permission denied" in done.stderr
