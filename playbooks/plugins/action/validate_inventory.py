"""Action plugin: checks the inventory's groups and variables before anything is changed.

Every variable that begins with a role's name must be one of that role's (meta/argument_specs.yml) and fit its type and
choices; the rest of the schema is in inventory_schema.yml beside this folder. All problems are told at once.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase

PLATFORM_PREFIX = "ictx"


def role_specs(roles: Path) -> dict[str, dict[str, Any]]:
    """Returns the public variables of each role: role → variable → specification."""
    return {
        path.parents[1].name: yaml.safe_load(path.read_text())["argument_specs"]["main"].get("options", {})
        for path in sorted(roles.glob("*/meta/argument_specs.yml"))
    }


def owner_of(variable: str, owners: Mapping[str, Any]) -> str | None:
    """Returns the longest owner (role, or the platform) whose name begins the variable's."""
    fitting = [owner for owner in owners if variable.startswith(f"{owner}_")]
    return max(fitting, key=len, default=None)


def relaxed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the specification as the validator takes it, without what only documents."""
    dropped = ("description", "required", "version_added", "default")
    result = {key: value for key, value in spec.items() if key not in dropped}
    if "options" in result:
        result["options"] = {
            name: {key: value for key, value in option.items() if key != "description"}
            for name, option in result["options"].items()
        }
    return result


def variable_problem(name: str, value: Any, spec: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the value, or None."""
    try:
        errors = ArgumentSpecValidator({name: relaxed(spec)}).validate({name: value}).error_messages
    except (TypeError, ValueError) as error:
        errors = [str(error)]
    return f"variable {name} is {value!r}: {'; '.join(errors)}" if errors else None


def problems(
    groups: Mapping[str, list[str]],
    variables: Mapping[str, Mapping[str, Any]],
    schema: Mapping[str, Any],
    roles: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Returns one line for each thing that is wrong.

    Args:
        groups: group → hosts.
        variables: host → variable → value.
        schema: the content of inventory_schema.yml.
        roles: role → variable → specification.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name, about in schema["groups"].items():
        if name not in groups:
            found[f"group {name} is missing ({about['purpose']}): add it, empty if the cluster has none"] |= set()
        elif about["members"] and not groups[name]:
            found[f"group {name} has no hosts ({about['purpose']}): it needs at least one"] |= set()
        for host in groups.get(name, []):
            for required in about.get("requires", []):
                if required not in variables[host]:
                    found[f"variable {required} is not set: hosts of group {name} need it"].add(host)
    owners: dict[str, Mapping[str, Any]] = {**roles, PLATFORM_PREFIX: schema["variables"]}
    known = [variable for options in owners.values() for variable in options]
    for host, values in variables.items():
        for required, spec in schema["variables"].items():
            if spec.get("required") and required not in values:
                found[f"variable {required} is not set: {spec['description']}"].add(host)
        for name in values:
            owner = owner_of(name, owners)
            if owner is None:
                continue
            if name not in owners[owner]:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"{owner} has {', '.join(sorted(owners[owner]))}"
                found[f"variable {name} is unknown: {hint}"].add(host)
                continue
            try:
                problem = variable_problem(name, values[name], owners[owner][name])
            except AnsibleError as error:
                problem = f"variable {name} cannot be evaluated: {error}"
            if problem:
                found[problem].add(host)
    everywhere = set(variables)
    return [
        text if not hosts or hosts == everywhere else f"{text} (on {', '.join(sorted(hosts))})"
        for text, hosts in found.items()
    ]


class Evaluated(Mapping[str, Any]):
    """A host's variables, each evaluated when it is asked for, as a play on that host would see it."""

    def __init__(self, hostvars: Any, groups: Mapping[str, list[str]], host: str, templar: Any) -> None:
        self.raw = hostvars.raw_get(host)
        # A variable may look at other hosts.
        self.templar = templar.copy_with_new_env(
            available_variables={**self.raw, "hostvars": hostvars, "groups": groups, "inventory_hostname": host}
        )

    def __getitem__(self, name: str) -> Any:
        return self.templar.template(self.raw[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


class ActionModule(ActionBase):
    """Returns RV(problems); takes RV(roles) and RV(schema), the paths to read from."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Checks the inventory of the running playbook."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        assert task_vars is not None
        hostvars = task_vars["hostvars"]
        hosts = sorted({host for members in task_vars["groups"].values() for host in members} - {"localhost"})
        result["problems"] = problems(
            task_vars["groups"],
            {host: Evaluated(hostvars, task_vars["groups"], host, self._templar) for host in hosts},
            yaml.safe_load(Path(self._task.args["schema"]).read_text()),
            role_specs(Path(self._task.args["roles"])),
        )
        result["changed"] = False
        return result
