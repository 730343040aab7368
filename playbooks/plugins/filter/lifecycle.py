"""Ansible filters: states of nodes, and upgrade paths between releases of SLURM."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.plugins.loader import filter_loader

# Every nine months until 23.11, every six since.
EARLY = ("20.02", "20.11", "21.08", "22.05", "23.02", "23.11")
# https://slurm.schedmd.com/upgrades.html: how many releases back a daemon reads databases, state files and messages.
WINDOW, WINDOW_UNTIL_24_05 = 3, 2

# Annotation with the reason why a Kubernetes node is cordoned, like the reason of a drained node in SLURM.
OUT_OF_SERVICE = "ictx/out-of-service"
# Prefix of the reason of a node that is lent to the other scheduler.
LENT = "lend.yml"


def chosen_nodes(chosen: str | Sequence[str], compute: Iterable[str]) -> dict[str, Any]:
    """Returns the `names` in a hostlist, or in a list of them, and a `problem` if some are not in `compute`."""
    expand = filter_loader.get("expand_nodes").j2_function
    try:
        names = [name for part in ([chosen] if isinstance(chosen, str) else chosen) for name in expand(part)]
    except ValueError as error:
        return {"names": [], "problem": f"nodes: {error}: set -e nodes= to a hostlist, such as gpu3 or gpu[1-4,7]"}
    known = list(compute)
    unknown = [name for name in names if name not in known]
    return {
        "names": names,
        "problem": f"nodes: {', '.join(unknown)}: no such node; known nodes: {', '.join(known)}" if unknown else "",
    }


def node_states(text: str) -> dict[str, dict[str, Any]]:
    """Returns what `scontrol --oneliner show node` prints, by node: `flags`, `reason`, `version` and `partitions`."""
    found = {}
    for line in text.splitlines():
        words = dict(re.findall(r"(?<!\S)(NodeName|State|Version|Partitions)=(\S*)", line))
        if "NodeName" not in words:
            continue
        reason = re.search(r"(?<!\S)Reason=(.*?)(?: \[\S+@\S+\])?\s*(?:Comment=.*)?$", line)
        found[words["NodeName"]] = {
            "flags": re.split(r"\W+", words.get("State", "").rstrip("*~#!%$@^-")),
            "reason": reason[1] if reason else "",
            "version": words.get("Version", ""),
            "partitions": [name for name in words.get("Partitions", "").split(",") if name],
        }
    return found


def cordons(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
    """Returns why each Kubernetes node is cordoned: empty without a reason; None if it is not cordoned."""
    return {
        node["metadata"]["name"]: (
            (node["metadata"].get("annotations") or {}).get(OUT_OF_SERVICE, "")
            if node["spec"].get("unschedulable")
            else None
        )
        for node in nodes
    }


def uncordoned(cordoned: Mapping[str, str | None], names: Iterable[str], only: str) -> list[str]:
    """Returns those of `names` that are cordoned (see `cordons`) with a reason that the expression `only` matches."""
    reasons = {name.lower(): cordoned.get(name.lower()) for name in names}
    return [name for name, reason in reasons.items() if reason is not None and re.match(only, reason)]


def whose_node(
    name: str, states: Mapping[str, Mapping[str, Any]], cordoned: Mapping[str, str | None], mark: str
) -> dict[str, bool]:
    """Returns where a playbook that drains nodes with reasons that begin with `mark` may resume a node.

    `slurm` and `kubernetes` are true if the node is in service there, or was drained by an interrupted run of the
    playbook; `unfinished` is true if there was such a run.
    """
    state, why = states.get(name), cordoned.get(name.lower())
    left = state is not None and "DRAIN" in state["flags"] and state["reason"].startswith(mark)
    left_pods = why is not None and why.startswith(mark)
    return {
        "slurm": state is not None and ("DRAIN" not in state["flags"] or left),
        "kubernetes": name.lower() in cordoned and (why is None or left_pods),
        "unfinished": left or left_pods,
    }


def lend_problems(
    names: Iterable[str], states: Mapping[str, Mapping[str, Any]], cordoned: Mapping[str, str | None]
) -> list[str]:
    """Returns why nodes are out of service, unless they are lent; `states` and `cordoned` as above."""
    problems = []
    for name in names:
        flags, reason = set(states[name]["flags"]), states[name]["reason"]
        if flags & {"DRAIN", "DOWN", "NOT_RESPONDING"} and not (reason.startswith(LENT) and "DRAIN" in flags):
            problems.append(f"{name} is {'+'.join(states[name]['flags'])} in SLURM ({reason or 'no reason'})")
        if name.lower() not in cordoned:
            problems.append(f"{name}: Kubernetes has no such node (playbooks/k3s.yml adds those of the inventory)")
        elif (why := cordoned[name.lower()]) is not None and not why.startswith(LENT):
            problems.append(f"{name} is cordoned in Kubernetes ({why or 'no reason'})")
    return problems


def not_ready(nodes: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Returns those of `names` whose kubelet does not report that it is ready."""
    ready = {
        node["metadata"]["name"]
        for node in nodes
        for condition in node.get("status", {}).get("conditions", [])
        if (condition["type"], condition["status"]) == ("Ready", "True")
    }
    return [name for name in names if name.lower() not in ready]


def not_evicted(results: Iterable[Mapping[str, Any]]) -> str:
    """Returns why pods were not evicted, from the results of the module k8s_drain; empty if all were."""
    problems = []
    for result in results:
        late = [text for text in result.get("warnings", []) if text.startswith("timeout reached")]
        if result.get("failed") or late:
            problems.append(f"{result.get('item', '')}: {result.get('msg') if result.get('failed') else late[0]}")
    return "; ".join(problems)


def pod_problem(pods: Sequence[Mapping[str, Any]], log: str) -> str:
    """Returns why the only one of `pods` has not succeeded, with the last line of its log; empty if it has."""
    if not pods:
        return "the pod is gone"
    status = pods[0].get("status", {})
    if status.get("phase") == "Succeeded":
        return ""
    causes = [status.get("reason"), status.get("message")]
    for container in status.get("containerStatuses", []):
        waiting, ended = (container.get("state", {}).get(name, {}) for name in ("waiting", "terminated"))
        causes += [waiting.get("reason"), waiting.get("message")]
        causes += [f"exit status {ended['exitCode']}" if "exitCode" in ended else None, ended.get("message")]
    causes += log.strip().splitlines()[-1:]
    return ": ".join([f"the pod is {status.get('phase', 'Unknown')}", *(str(cause) for cause in causes if cause)])


def release(version: str) -> str:
    """Returns the release of a version, such as 24.11 for 24.11.5-4+deb13u1. Raises AnsibleFilterError."""
    found = re.match(r"(?:\d+:)?(\d\d\.\d\d)(?!\d)", version)
    if not found:
        raise AnsibleFilterError(f"{version!r} is not a version of SLURM")
    return found[1]


def _number(name: str) -> int:
    """Returns a release's number in the sequence of releases. Raises AnsibleFilterError."""
    year, month = (int(part) for part in name.split("."))
    if name in EARLY:
        return EARLY.index(name)
    if year < 24 or month not in (5, 11):
        raise AnsibleFilterError(f"{name} is not a release of SLURM that this playbook supports")
    return len(EARLY) + (year - 24) * 2 + month // 11


def _name(number: int) -> str:
    if number < len(EARLY):
        return EARLY[number]
    years, second = divmod(number - len(EARLY), 2)
    return f"{24 + years}.{'11' if second else '05'}"


def _reads(new: int, old: int) -> bool:
    """Returns whether a release can read the state of an earlier one."""
    return new - old <= (WINDOW if new >= _number("24.11") else WINDOW_UNTIL_24_05)


def upgrade_problem(before: str, after: str) -> str:
    """Returns why SLURM cannot be upgraded from one version to another in one step, and the remedy; empty if it can."""
    old, new = _number(release(before)), _number(release(after))
    if new < old:
        return f"SLURM {before} cannot be downgraded to {after}: databases and state files are not compatible"
    if _reads(new, old):
        return ""
    reached = [number for number in range(old + 1, new) if _reads(number, old)]
    through = [number for number in reached if _reads(new, number)] or reached[-1:]
    return (
        f"SLURM {before} cannot be upgraded to {after} in one step: its databases, state files and messages are too "
        f"old. Upgrade to {' or '.join(_name(number) for number in through)} first (docs/operations.md)"
    )


def planned_packages(simulation: str) -> dict[str, dict[str, str]]:
    """Returns the packages that `apt-get --simulate install` would upgrade, with both versions, and remove."""
    upgraded = re.findall(r"^Inst (\S+) \[(\S+)\] \((\S+)", simulation, re.MULTILINE)
    return {
        "before": {name: before for name, before, _ in upgraded},
        "after": {name: after for name, _, after in upgraded},
        "removed": dict(re.findall(r"^Remv (\S+) \[(\S+)\]", simulation, re.MULTILINE)),
    }


def upgrade_problems(hosts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns why hosts cannot be upgraded together.

    Args:
        hosts: variables of each: `upgrade_version` and `upgrade_to`, versions of SLURM before and after;
            `upgrade_packages`, names of SLURM's packages; `upgrade_plan`, as `planned_packages` returns it.
    """
    plans = list(hosts)
    steps = {upgrade_problem(host["upgrade_version"], host["upgrade_to"]) for host in plans} - {""}
    releases = sorted({release(host["upgrade_to"]) for host in plans})
    removed = sorted(
        {name for host in plans for name in host["upgrade_packages"] if name in host["upgrade_plan"]["removed"]}
    )
    problems = sorted(steps)
    if len(releases) > 1:
        problems.append(
            f"the hosts would get different releases of SLURM, {', '.join(releases)}: give all the same apt sources"
        )
    if removed:
        problems.append(f"apt would remove {', '.join(removed)}")
    return problems


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {
            "chosen_nodes": chosen_nodes,
            "cordons": cordons,
            "lend_problems": lend_problems,
            "node_states": node_states,
            "not_evicted": not_evicted,
            "not_ready": not_ready,
            "planned_packages": planned_packages,
            "pod_problem": pod_problem,
            "uncordoned": uncordoned,
            "upgrade_problems": upgrade_problems,
            "whose_node": whose_node,
        }
