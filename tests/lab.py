"""The running lab, with its users' access."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STATE = Path(os.environ.get("ICTX_LAB_STATE", Path.home() / ".local/state/ictx/lab"))
SHARED = STATE / "shared"


@dataclass(frozen=True)
class Lab:
    """Runs commands on the lab's nodes over SSH."""

    def address(self, node: str) -> str:
        """Returns a node's address."""
        match = re.search(rf"^Host {node}\n  HostName (\S+)", (STATE / "ssh/config").read_text(), re.MULTILINE)
        assert match, f"the lab has no node {node}"
        return match[1]

    def tracking(self) -> dict[str, str]:
        """Returns the environment for MLflow's client as the administrator of the lab's server."""
        return {
            "MLFLOW_TRACKING_URI": f"https://{self.address('kube1')}:30500",
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(STATE / "ca/ca.crt"),
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": (STATE / "secrets/mlflow_admin_password").read_text().strip(),
        }

    def run(self, node: str, command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
        """Runs a command on a node and returns the completed process, also if it failed."""
        if user != "root":
            command = f"runuser -l {user} -c {shlex.quote(command)}"
        return subprocess.run(
            ["ssh", "-F", str(STATE / "ssh" / "config"), node, "--", command],
            capture_output=True,
            text=True,
            # Names of jobs can be arbitrary bytes.
            errors="backslashreplace",
            check=False,
        )

    def user(self, command: str) -> str:
        """Returns the output of a command that an ordinary user runs on the controller; it must succeed."""
        done = self.run("ctl", command, user="researcher")
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        """Submits the pretraining job with options and arguments; returns its number."""
        options = [word for word in words if word.startswith("-")]
        arguments = [word for word in words if not word.startswith("-")]
        return self.user(
            f"sbatch --parsable {shlex.join(options)} /opt/ictx/jobs/pretrain.sbatch {shlex.join(arguments)}"
        )

    def follow(self, job: str) -> tuple[int, str]:
        """Follows a job to its end; returns the follower's exit status and output."""
        done = self.run("ctl", f"/opt/ictx/bin/ictx-follow {job}", user="researcher")
        print(done.stdout, done.stderr)
        return done.returncode, done.stdout

    def wait_in(self, job: str, what: str, condition: Callable[[], bool]) -> None:
        """Waits for a condition on a running job; fails with the job's log if the job ends before."""

        def reached() -> bool:
            if condition():
                return True
            log = self.folder(job).with_name(f"{job}.log")
            assert self.user(f"squeue --noheader --jobs={job}"), f"job {job} ended before {what}: {log.read_text()}"
            return False

        wait_for(what, reached)

    def accounts(self, job: str, field: str) -> str:
        """Returns a field of the job's last start from the accounting records."""
        return self.user(f"sacct --noheader --allocations --parsable2 --jobs={job} --format={field}")

    def restarts(self, job: str) -> int:
        """Returns the number of times that the job was requeued."""
        return int(self.user(f"scontrol --oneliner show job {job} | grep -o 'Restarts=[0-9]*' | cut -d= -f2"))

    def folder(self, job: str) -> Path:
        """Returns the job's folder on this machine."""
        return SHARED / "runs" / "researcher" / job

    def result(self, job: str) -> dict[str, Any]:
        """Returns the job's result.json."""
        content: dict[str, Any] = json.loads((self.folder(job) / "result.json").read_text())
        return content

    def records(self, job: str) -> list[dict[str, float]]:
        """Returns the job's metrics."""
        file = self.folder(job) / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 600) -> None:
    """Waits until the condition holds; fails with `what` after the timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(1)
