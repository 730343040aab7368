"""The health check of a compute node: the problems that it finds, and the nodes that it drains and resumes.

`scontrol` and `nvidia-smi` are stubs with the output of SLURM 22.05 and of the driver; molecule/default runs it on
a node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, Cluster
from programs import loaded

PROGRAM = ROOT / "roles/slurm/files/ictx-node-health"
NOTHING = {"mounts": [], "memory_mb": 0, "disks": [], "clock": False, "runtime": "", "gpus": 0, "xids": [79]}
CONFIG = {"node": "n1", "stray_users": [], **NOTHING}
GPUS = "0, 0\n1, 0\n2, [N/A]\n3, 0\n"


@pytest.fixture
def health() -> Any:
    """Returns the program as a module."""
    return loaded(PROGRAM)


def stand_in(folder: Path, name: str, script: str) -> None:
    """Creates a program in the folder."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run(folder: Path, node: str, *arguments: str, **config: Any) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the program with this output of scontrol; returns the process and the updates sent to scontrol."""
    (folder / "shown").write_text(node)
    (folder / "updates").write_text("")
    stand_in(folder, "scontrol", f'[ "$2" = show ] && exec cat {folder}/shown; printf "%s\\n" "$*" >>{folder}/updates')
    stand_in(folder, "logger", "")
    (folder / "health.json").write_text(json.dumps(CONFIG | config))
    done = subprocess.run(
        [sys.executable, PROGRAM, "--config", folder / "health.json", *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done, (folder / "updates").read_text().splitlines()


def shown(state: str, reason: str = "") -> str:
    """Returns the output of `scontrol --oneliner show node`."""
    text = f"NodeName=n1 Arch=x86_64 CPUTot=8 State={state} ThreadsPerCore=1 BootTime=2026-11-27T05:00:00"
    return f"{text} Reason={reason} [root@2026-11-27T06:26:01] Comment=a b\n" if reason else f"{text}\n"


SICK = {"mounts": ["/nowhere"]}
OURS = "ictx-health: /nowhere is not mounted"
DRAIN = f"update nodename=n1 state=drain reason={OURS}"


@pytest.mark.parametrize(
    ("node", "config", "updates"),
    [
        (shown("IDLE"), {}, []),
        (shown("IDLE"), SICK, [DRAIN]),
        (shown("DOWN*", "Not responding"), SICK, [DRAIN]),
        # The same problem again, and another one.
        (shown("IDLE+DRAIN", OURS), SICK, []),
        (shown("MIXED+DRAIN", "ictx-health: the clock is not synchronised"), SICK, [DRAIN]),
        # It resumes nodes that it drained, but a node that is also down stays down.
        (shown("IDLE+DRAIN", OURS), {}, ["update nodename=n1 state=undrain"]),
        (shown("DOWN+DRAIN", OURS), {}, ["update nodename=n1 state=undrain"]),
        # It never resumes nodes that others drained or set down.
        (shown("IDLE+DRAIN", "new disk"), SICK, []),
        (shown("IDLE+DRAIN", "new disk"), {}, []),
        (shown("IDLE+DRAIN", f"was {OURS}"), {}, []),
        (shown("DOWN", OURS), {}, []),
        # The controller does not respond.
        ("", SICK, []),
    ],
)
def test_it_drains_and_resumes_what_is_its_own_to(
    tmp_path: Path, node: str, config: dict[str, Any], updates: list[str]
) -> None:
    done, changed = run(tmp_path, node, **config)
    assert (done.returncode, changed) == (0, updates)


def test_a_dry_run_prints_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    done, changed = run(tmp_path, shown("IDLE"), "--dry-run", **SICK)
    assert (done.returncode, done.stdout, changed) == (1, "/nowhere is not mounted\n", [])
    assert run(tmp_path, shown("IDLE"), "--dry-run")[0].returncode == 0


def test_a_configuration_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--config", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "No such file" in done.stderr.splitlines()[-1]


def test_disks_memory_and_the_runtime(health: Any, tmp_path: Path) -> None:
    disks = [{"path": str(tmp_path), "min_free_mb": 10**9}, {"path": "/nowhere", "min_free_mb": 1}]
    problems = health.look(CONFIG | {"disks": disks, "memory_mb": 10**9, "runtime": str(tmp_path / "runc")})
    assert len(problems) == 4
    assert "MB of memory, expected 1000000000" in problems[0]
    assert f"{tmp_path} has " in problems[1]
    assert problems[2:] == ["/nowhere: No such file or directory", f"{tmp_path}/runc does not start"]
    (point,) = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()} & {"/proc"}
    fine = CONFIG | {"mounts": [f"{point}/"], "disks": [{"path": "/", "min_free_mb": 0}], "memory_mb": 1}
    assert health.look(fine | {"runtime": sys.executable}) == []


def test_a_mount_whose_server_is_gone_is_a_problem_and_not_waited_for(
    health: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "stat", "sleep 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(health.answer, "__kwdefaults__", {"seconds": 0.2})
    began = time.monotonic()
    assert health.look(CONFIG | {"mounts": ["/proc"]}) == ["/proc does not respond"]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("smi", "problems"),
    [
        (GPUS, []),
        (GPUS.replace("1, 0\n", ""), ["3 of 4 GPUs respond"]),
        (GPUS.replace("3, 0", "3, 2"), ["GPU 3 has 2 uncorrectable ECC errors"]),
        ("", ["0 of 4 GPUs respond"]),
    ],
)
def test_gpus_that_are_missing_or_have_errors(
    health: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smi: str, problems: list[str]
) -> None:
    (tmp_path / "smi").write_text(smi)
    stand_in(tmp_path, "nvidia-smi", f"cat {tmp_path}/smi")
    stand_in(tmp_path, "journalctl", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert health.look(CONFIG | {"gpus": 4}) == problems


def test_errors_of_the_driver_that_need_a_reset(health: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = (
        "NVRM: Xid (PCI:0000:07:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        "NVRM: Xid (PCI:0000:07:00): 79, pid=1, again\n"
        "NVRM: Xid (PCI:0000:47:00): 13, pid=4711, name=python, Graphics Exception: a user's own fault\n"
    )
    stand_in(tmp_path, "nvidia-smi", "echo '0, 0'")
    (tmp_path / "log").write_text(log)
    stand_in(tmp_path, "journalctl", f"cat {tmp_path}/log")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert health.look(CONFIG | {"gpus": 1}) == ["Xid 79 of GPU 0000:07:00: reset it, or reboot"]


@pytest.mark.skipif(os.getuid() != 0, reason="requires root, to start a process of another user")
def test_processes_of_users_without_a_job(health: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MARKS", tmp_path)
    # The user chooses the process name, so no part of it may be in the reason, which root passes to scontrol.
    process = subprocess.Popen(["bash", "-c", "exec -a 'x state=idle' sleep 60"], user=65534, start_new_session=True)
    try:
        config = CONFIG | {"stray_users": ["nobody"]}
        assert health.look(config) == [], "a new process is ignored, as its job's epilog may still run"
        monkeypatch.setattr(health, "SETTLED_SECONDS", -1)
        assert health.look(config) == [f"1 processes of nobody without a job, e.g. {process.pid}"]
        assert health.look(CONFIG) == []
        (tmp_path / "65534").mkdir()
        assert health.look(config) == [], "the user has a job on this node"
    finally:
        process.kill()
        process.wait()


def test_a_check_that_fails_is_a_problem_itself(health: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROC", tmp_path)
    assert health.look(CONFIG | {"mounts": ["/"]})[:2] == [
        "mounts cannot be checked (FileNotFoundError)",
        "memory cannot be checked (FileNotFoundError)",
    ]


def health_json(inventory: str, host: str, **variables: Any) -> dict[str, Any]:
    cluster = Cluster(ROOT / "inventories" / inventory, {"ictx_state_dir": "/nonexistent", **variables})
    role, play, _ = next(use for use in cluster.uses("playbooks/slurm.yml") if use[0].get_name() == "slurm")
    text = cluster.render(ROOT / "roles/slurm/templates/health.json.j2", cluster.variables(host, play, role))
    return json.loads(text)


def test_what_is_looked_at_follows_from_the_inventory() -> None:
    assert health_json("example", "gpu1", slurm_health_mounts=["/scratch"]) == {
        "node": "gpu1",
        "mounts": ["/shared", "/scratch"],
        "memory_mb": 515842 - 16384,
        "disks": [{"path": "/", "min_free_mb": 1024}],
        "clock": True,
        "runtime": "nvidia-container-runtime",
        "gpus": 4,
        "xids": [48, 64, 74, 79, 95, 119, 120, 140],
        "stray_users": ["alice", "bob"],
    }
    lab = health_json("lab", "n1")
    assert (lab["gpus"], lab["clock"], lab["stray_users"], lab["runtime"]) == (0, False, [], "runc")
    # The lab's simulated GPUs have no device files.
    assert health_json("lab", "n1", lab_fake_gpus=2)["gpus"] == 0
