"""The lifecycle playbooks: parsing of SLURM's output, and the commands that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from programs import loaded, play

LIFECYCLE = loaded(ROOT / "playbooks/plugins/filter/lifecycle.py")
SHOWN = (
    "NodeName=n1 Arch=x86_64 CPUTot=2 NodeAddr=192.0.2.21 NodeHostName=n1 Version=22.05.8 OS=Linux 6.1 #1 SMP "
    "State=IDLE+DRAIN ThreadsPerCore=1 Partitions=batch,urgent  CfgTRES=cpu=2 "
    "Reason=State=DOWN, a fan [root@2026-11-27T06:14:45]\n"
    "NodeName=n2 Arch=x86_64 CPUTot=2 Version=24.11.5 State=MIXED*+COMPLETING+DRAIN+NOT_RESPONDING ThreadsPerCore=1 \n"
    "NodeName=n3 CPUTot=2 State=UNKNOWN Partitions=batch  "
    "Reason=add-node.yml validates it [root@2026-11-27T06:14:45] Comment=x\n"
)


def test_states_are_read_with_their_reasons() -> None:
    found = LIFECYCLE.node_states(SHOWN)
    assert {name: node["flags"] for name, node in found.items()} == {
        "n1": ["IDLE", "DRAIN"],
        "n2": ["MIXED", "COMPLETING", "DRAIN", "NOT_RESPONDING"],
        "n3": ["UNKNOWN"],
    }
    assert [node["reason"] for node in found.values()] == ["State=DOWN, a fan", "", "add-node.yml validates it"]
    assert found["n1"]["partitions"] == ["batch", "urgent"]
    assert (found["n1"]["version"], found["n2"]["version"], found["n3"]["version"]) == ("22.05.8", "24.11.5", "")


@pytest.mark.parametrize(
    ("chosen", "names", "problem"),
    [
        ("n[1-2]", ["n1", "n2"], ""),
        (["n1", "n2"], ["n1", "n2"], ""),
        ("n1,n9", ["n1", "n9"], "n9: no such node; known nodes: n1, n2"),
        ("", [], "is not a list of nodes"),
        ("n[2-1]", [], "is not a range"),
    ],
)
def test_a_choice_is_of_compute_nodes(chosen: str | list[str], names: list[str], problem: str) -> None:
    found = LIFECYCLE.chosen_nodes(chosen, ["n1", "n2"])
    assert found["names"] == names
    assert problem in found["problem"]
    assert bool(found["problem"]) == bool(problem)


@pytest.mark.parametrize(
    ("before", "after", "through"),
    [
        ("22.05.8-4+deb12u3", "22.05.8-4+deb12u4", ""),
        ("22.05.8", "23.11.10", ""),
        ("22.05.8", "24.05.1", "23.02 or 23.11"),
        ("22.05.8-4+deb12u3", "24.11.5-4+deb13u1", "23.02 or 23.11"),
        ("23.02.1", "24.11.5", ""),
        ("24.11.5", "26.05.3", ""),
        ("24.05.5", "26.05.3", "24.11 or 25.05 or 25.11"),
        ("20.11.9", "24.11.5", "22.05 first"),
    ],
)
def test_a_step_skips_no_more_releases_than_slurm_reads(before: str, after: str, through: str) -> None:
    problem = LIFECYCLE.upgrade_problem(before, after)
    assert bool(problem) == bool(through)
    assert through in problem


def test_no_way_back() -> None:
    assert "cannot be downgraded to 22.05.8" in LIFECYCLE.upgrade_problem("24.11.5", "22.05.8")


def test_the_plan_is_what_apt_would_do() -> None:
    plan = LIFECYCLE.planned_packages(
        "Inst slurmd [22.05.8-4+deb12u3] (24.11.5-4+deb13u1 Debian:13.8/stable [amd64])\n"
        "Inst libjwt2 (1.17.2-1 Debian:13.8/stable [amd64])\nRemv libssl3 [3.0.22-1~deb12u2] [systemd:amd64 ]\n"
    )
    assert plan == {
        "before": {"slurmd": "22.05.8-4+deb12u3"},
        "after": {"slurmd": "24.11.5-4+deb13u1"},
        "removed": {"libssl3": "3.0.22-1~deb12u2"},
    }


def test_hosts_are_upgraded_together_or_not_at_all() -> None:
    def host(before: str, after: str, *removed: str) -> dict[str, Any]:
        plan = {"after": {}, "removed": dict.fromkeys(removed, before)}
        return {
            "upgrade_version": before,
            "upgrade_to": after,
            "upgrade_packages": ["slurmd", "slurm-client"],
            "upgrade_plan": plan,
        }

    assert LIFECYCLE.upgrade_problems([host("22.05.8", "23.11.10"), host("23.11.10", "23.11.10", "libssl3")]) == []
    problems = LIFECYCLE.upgrade_problems([host("22.05.8", "24.11.5"), host("22.05.8", "22.05.8", "slurmd")])
    assert len(problems) == 3
    assert "cannot be upgraded to 24.11.5 in one step" in problems[0]
    assert "different releases of SLURM, 22.05, 24.11" in problems[1]
    assert problems[2] == "apt would remove slurmd"


# Reads the states of nodes and their jobs from files of the test, and records the commands.
FAKE = """#!/bin/sh
cd {folder}
echo $(basename "$0") "$*" >>calls
case "$(basename "$0") $*" in
"scontrol --oneliner show node"*) cat states ;;
"scontrol update"*) [ ! -e lost ] || rm states ;;
squeue*) cat jobs; : >jobs ;;
srun*) echo "srun: error: Unable to allocate resources" >&2; exit $(cat status) ;;
"timeout 600"*) shift; exec "$@" ;;
esac
"""


def run(
    folder: Path, tasks: str, *, states: str, jobs: str = "", srun: int = 0, **variables: Any
) -> tuple[Any, list[str]]:
    """Runs a file of playbooks/tasks with stubs of SLURM's programs; returns the run and the changing commands."""
    for name, text in {"states": states, "jobs": jobs, "status": str(srun), "calls": ""}.items():
        (folder / name).write_text(text)
    for name in ("scontrol", "squeue", "srun", "timeout"):
        (folder / name).write_text(FAKE.format(folder=folder))
        (folder / name).chmod(0o755)
    path = {"environment": {"PATH": f"{folder}:/usr/bin:/bin"}}
    task = {"ansible.builtin.include_tasks": {"file": str(ROOT / "playbooks/tasks" / tasks), "apply": path}}
    done = play(folder, [task], {"lifecycle_minutes": 1, "lifecycle_reason": "a fan, is noisy", **variables})
    calls = [line for line in (folder / "calls").read_text().splitlines() if not line.startswith(("timeout", "squeue"))]
    return done, [line for line in calls if "show node" not in line]


def state(name: str, flags: str, reason: str = "") -> str:
    """Returns a node in scontrol's format."""
    shown = f"Reason={reason} [root@x]" if reason else ""
    return f"NodeName={name} Version=24.11.5 State={flags} Partitions=batch,urgent  {shown}\n"


@pytest.mark.full
def test_nodes_in_service_are_drained_and_others_keep_their_reason(tmp_path: Path) -> None:
    shown = state("n1", "MIXED") + state("n2", "IDLE+DRAIN", "disk")
    done, calls = run(tmp_path, "drain_nodes.yml", states=shown, jobs="12\n", lifecycle_nodes=["n1", "n2"])
    assert done.returncode == 0, done.stdout
    assert calls == ["scontrol update NodeName=n1 State=DRAIN Reason=a fan, is noisy"]
    done, calls = run(tmp_path, "drain_nodes.yml", states=state("n1", "IDLE+DRAIN", "disk"), lifecycle_nodes=["n1"])
    assert (done.returncode, calls) == (0, [])


@pytest.mark.full
def test_a_node_whose_jobs_do_not_end_in_time_stays_drained(tmp_path: Path) -> None:
    shown = state("n1", "ALLOCATED")
    done, calls = run(
        tmp_path, "drain_nodes.yml", states=shown, jobs="12\n", lifecycle_nodes=["n1"], lifecycle_minutes=0.01
    )
    assert done.returncode == 2
    assert "jobs 12 have not ended within 0.01 minutes. The nodes stay drained" in " ".join(done.stdout.split())
    assert calls == ["scontrol update NodeName=n1 State=DRAIN Reason=a fan, is noisy"]


@pytest.mark.full
def test_only_nodes_that_are_out_of_service_are_resumed(tmp_path: Path) -> None:
    shown = state("n1", "IDLE+DRAIN") + state("n2", "MIXED") + state("n3", "IDLE")
    done, calls = run(tmp_path, "resume_nodes.yml", states=shown, lifecycle_nodes=["n1", "n2", "n3"])
    assert done.returncode == 0, done.stdout
    assert calls == ["scontrol update NodeName=n1 State=RESUME"]


@pytest.mark.full
def test_a_controller_that_is_lost_is_no_node_that_answers(tmp_path: Path) -> None:
    (tmp_path / "lost").touch()
    names = {"lifecycle_nodes": ["n1"], "lifecycle_retries": 1}
    done, calls = run(tmp_path, "resume_nodes.yml", states=state("n1", "IDLE+DRAIN"), **names)
    assert (done.returncode, calls) == (2, ["scontrol update NodeName=n1 State=RESUME"])
    assert "scontrol: cat: states: No such file" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("srun", [0, 1])
def test_a_node_is_resumed_for_our_job_alone_and_drained_when_it_fails(tmp_path: Path, srun: int) -> None:
    shown = state("n1", "IDLE+DRAIN")
    named = {"lifecycle_node": "n1", "lifecycle_command": "hostname"}
    done, calls = run(tmp_path, "validate_node.yml", states=shown, srun=srun, **named)
    created, resumed, job, *rest = calls
    assert created.startswith("scontrol create reservation ReservationName=ictx-validate-n1 Users=root Nodes=n1 ")
    assert resumed == "scontrol update NodeName=n1 State=RESUME"
    assert "--reservation=ictx-validate-n1 --partition=batch --nodelist=n1" in job
    ended = "scontrol delete ReservationName=ictx-validate-n1"
    if srun:
        drained = "scontrol update NodeName=n1 State=DRAIN Reason=a fan, is noisy, failed: srun: error: Unable to"
        assert (done.returncode, len(rest), rest[1]) == (2, 2, ended)
        assert rest[0].startswith(drained)
        assert "n1 stays drained" in done.stdout
    else:
        assert (done.returncode, rest) == (0, [ended]), done.stdout


def kubernetes(name: str, cordoned: bool = False, reason: str = "", ready: str = "True") -> dict[str, Any]:
    """Returns a node in the format of Kubernetes' API."""
    annotations = {"ictx/out-of-service": reason} if reason else {}
    return {
        "metadata": {"name": name, **({"annotations": annotations} if reason else {})},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {"conditions": [{"type": "DiskPressure", "status": "False"}, {"type": "Ready", "status": ready}]},
    }


NODES = [
    kubernetes("n1"),
    kubernetes("n2", True, "upgrade.yml: 1 to 2"),
    kubernetes("n3", True),
    kubernetes("n4", True, "lend.yml: x"),
]


def test_cordoned_nodes_have_their_reasons_and_lent_ones_are_not_resumed() -> None:
    cordoned = LIFECYCLE.cordons(NODES)
    assert cordoned == {"n1": None, "n2": "upgrade.yml: 1 to 2", "n3": "", "n4": "lend.yml: x"}
    names = ["N1", "N2", "N3", "N4"]
    assert LIFECYCLE.uncordoned(cordoned, names, r"(?!lend\.yml)") == ["n2", "n3"]
    assert LIFECYCLE.uncordoned(cordoned, names, r"lend\.yml") == ["n4"]
    assert LIFECYCLE.not_ready([*NODES, kubernetes("n5", ready="Unknown")], ["N1", "n5", "n6"]) == ["n5", "n6"]


@pytest.mark.parametrize(
    ("slurm", "cordoned", "mine"),
    [
        (("IDLE", ""), None, {"slurm": True, "kubernetes": True, "unfinished": False}),
        (("IDLE+DRAIN", "a fan"), "", {"slurm": False, "kubernetes": False, "unfinished": False}),
        (
            ("IDLE+DRAIN", "lend.yml: lent to Kubernetes"),
            None,
            {"slurm": False, "kubernetes": True, "unfinished": False},
        ),
        (("MIXED", ""), "lend.yml: lent to SLURM", {"slurm": True, "kubernetes": False, "unfinished": False}),
        (("IDLE+DRAIN", "upgrade.yml: 1"), "upgrade.yml: 1", {"slurm": True, "kubernetes": True, "unfinished": True}),
        (("IDLE+DRAIN", "a fan"), "upgrade.yml: 1", {"slurm": False, "kubernetes": True, "unfinished": True}),
    ],
)
def test_a_node_is_put_back_only_where_the_playbook_took_it_out(
    slurm: tuple[str, str], cordoned: str | None, mine: dict[str, bool]
) -> None:
    states = LIFECYCLE.node_states(state("GPU1", *slurm))
    assert LIFECYCLE.whose_node("GPU1", states, {"gpu1": cordoned}, "upgrade.yml") == mine


def test_a_node_of_one_of_both_is_put_back_there_alone() -> None:
    assert LIFECYCLE.whose_node("n1", {}, {"n1": None}, "x") == {
        "slurm": False,
        "kubernetes": True,
        "unfinished": False,
    }
    states = LIFECYCLE.node_states(state("n1", "IDLE"))
    assert LIFECYCLE.whose_node("n1", states, {}, "x") == {"slurm": True, "kubernetes": False, "unfinished": False}


@pytest.mark.parametrize(
    ("slurm", "cordoned", "problem"),
    [
        (("IDLE", ""), {"n1": None}, ""),
        (("IDLE", ""), {"n1": "lend.yml: lent to SLURM"}, ""),
        (("MIXED+DRAIN", "lend.yml: lent to Kubernetes"), {"n1": None}, ""),
        # A run that was interrupted between the two.
        (("IDLE+DRAIN", "lend.yml: x"), {"n1": "lend.yml: x"}, ""),
        (("IDLE+DRAIN", "a fan"), {"n1": None}, "n1 is IDLE+DRAIN in SLURM (a fan)"),
        (("DOWN*+NOT_RESPONDING", ""), {"n1": None}, "n1 is DOWN+NOT_RESPONDING in SLURM (no reason)"),
        (("IDLE", ""), {"n1": ""}, "n1 is cordoned in Kubernetes (no reason)"),
        (("IDLE", ""), {}, "n1: Kubernetes has no such node"),
    ],
)
def test_a_node_that_something_else_keeps_out_is_not_lent(
    slurm: tuple[str, str], cordoned: dict[str, str | None], problem: str
) -> None:
    found = LIFECYCLE.lend_problems(["n1"], LIFECYCLE.node_states(state("n1", *slurm)), cordoned)
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_why_pods_stay_and_why_one_failed_are_one_line() -> None:
    late = {"item": "n1", "warnings": ["Ignoring DaemonSet", "timeout reached while pods were still running."]}
    budget = {"item": "n2", "failed": True, "msg": "Cannot evict pod: disruption budget"}
    assert LIFECYCLE.not_evicted([{"item": "n3"}, late, budget]) == (
        "n1: timeout reached while pods were still running.; n2: Cannot evict pod: disruption budget"
    )
    ended = {"status": {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": 9}}}]}}
    assert LIFECYCLE.pod_problem([ended], "a\nno devices\n") == "the pod is Failed: exit status 9: no devices"
    waiting = {
        "status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
    }
    assert LIFECYCLE.pod_problem([waiting], "") == "the pod is Pending: ErrImagePull"
    assert LIFECYCLE.pod_problem([{"status": {"phase": "Succeeded"}}], "n1\n") == ""
    assert LIFECYCLE.pod_problem([], "") == "the pod is gone"


@pytest.mark.full
def test_a_node_that_is_lent_is_resumed_by_the_lending_alone(tmp_path: Path) -> None:
    shown = state("n1", "IDLE+DRAIN", "lend.yml: lent to Kubernetes")
    done, calls = run(tmp_path, "resume_nodes.yml", states=shown, lifecycle_nodes=["n1"])
    assert (done.returncode, calls) == (0, []), done.stdout
    done, calls = run(tmp_path, "resume_nodes.yml", states=shown, lifecycle_nodes=["n1"], lifecycle_only=r"lend\.yml")
    assert (done.returncode, calls) == (0, ["scontrol update NodeName=n1 State=RESUME"]), done.stdout
