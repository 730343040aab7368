"""Access to the scenario's nodes for administrators and users."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import testinfra
from testinfra.host import Host

SSH_CONFIG = Path(os.environ["ICTX_LAB_STATE"]) / "ssh/config"
CONTROLLERS = ["ctl", "ctl2"]
COMPUTE = ["n1", "n2"]


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(SSH_CONFIG))


def as_user(command: str, user: str = "researcher") -> str:
    """Runs a command on the controller as an ordinary user, which must succeed; returns its output."""
    return str(node("ctl").check_output(f"cd /tmp && runuser -l {user} -c {shlex.quote(command)}"))


def queued(*options: str, command: str = "sleep 1") -> str:
    """Submits a job; returns its number."""
    words = " ".join(options)
    return as_user(f"sbatch --parsable --mem=50 --output=/dev/null {words} --wrap='{command}'")


def accounts(job: str, fields: str) -> str:
    """Returns fields of a job's allocation in the accounts; empty before it is there."""
    return as_user(f"sacct --noheader --allocations --parsable2 --jobs={job} --format={fields}")


def states() -> dict[str, str]:
    """Returns the state of each node."""
    lines = node("ctl").check_output("sinfo --noheader --Node --format='%N %T' --partition=batch").splitlines()
    return dict(line.split() for line in lines)


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
    """Waits until the condition holds; fails with `what` on timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(1)


def power_on(name: str) -> None:
    """Waits until a node's container has stopped and starts it, like the firmware of a machine that restarts."""
    container = f"{os.environ['ICTX_LAB_NAME']}-{name}"
    environment = {**os.environ, "CONTAINERS_CONF": os.path.join(os.environ["ICTX_LAB_STATE"], "containers.conf")}
    for command in (["podman", "wait", container], ["podman", "start", container]):
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=900)
    node("ctl").check_output("/usr/local/sbin/use-up-namespace-ids")  # see its docstring


def played(*arguments: str, status: int = 0) -> str:
    """Runs ansible-playbook on the scenario's inventory; returns its output."""
    done = subprocess.run(
        ["ansible-playbook", f"--inventory={os.environ['MOLECULE_INVENTORY']}", *arguments],
        capture_output=True,
        text=True,
        cwd=os.environ["MOLECULE_PROJECT_DIRECTORY"],
        env={**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
        check=False,
    )
    assert done.returncode == status, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout


def changed(output: str) -> int:
    """Returns the number of changed tasks in a playbook's output."""
    return sum(int(number) for number in re.findall(r" changed=(\d+) ", output))
