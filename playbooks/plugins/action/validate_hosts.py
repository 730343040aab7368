"""Action plugin: sums up what a play asked of every host (does it answer, has the shared directory room)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.plugins.action import ActionBase

LEAST_FREE_GB = 5


def host_problems(name: str, values: Mapping[str, Any]) -> list[str]:
    """Returns one line for each thing that is wrong with a host; `values` holds what the play registered."""
    if "preflight_ping" not in values:
        return []
    if "ping" not in values["preflight_ping"]:
        reason = " ".join(str(values["preflight_ping"].get("msg", "no answer")).split())
        return [f"host {name} ({values.get('ansible_host', name)}) is unreachable: {reason}"]
    lines = values.get("preflight_shared", {}).get("stdout_lines", [])
    least = int(values.get("ictx_shared_min_free_gb", LEAST_FREE_GB))
    if len(lines) == 2 and int(lines[1]) < least:
        return [
            f"ictx_shared_dir {values['ictx_shared_dir']} has {lines[1].strip()} GB free as {name} sees it, "
            f"ictx_shared_min_free_gb asks for {least}: remove what is no longer needed"
        ]
    return []


class ActionModule(ActionBase):
    """Returns RV(problems) of all hosts of the inventory."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Reads what playbooks/preflight.yml registered."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        assert task_vars is not None
        hostvars = task_vars["hostvars"]
        hosts = sorted(set(hostvars) - {"localhost"})
        result["problems"] = [problem for host in hosts for problem in host_problems(host, hostvars[host])]
        result["changed"] = False
        return result
