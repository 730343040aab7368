"""Ansible action: compares a whole inventory with what the roles and the schema ask for, and reports every problem."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import lookup_loader
from ansible.utils.vars import load_extra_vars

DOCUMENTATION = r"""
action: check_inventory
short_description: Compares a whole inventory with what the roles and the schema ask for
description:
  - Reads only, and on the control host only. Every problem is one line of RV(problems) that names the variable or
    group, the hosts and what is allowed.
options:
  playbook: {type: path, required: true, description: Playbook whose imports name the roles that will run.}
  roles_dir: {type: path, required: true, description: Folder of the roles.}
  schema: {type: path, required: true, description: File with the variables and groups of the whole cluster.}
author: [InfiniteContext]
"""

PLACEHOLDER = "CHANGE-ME"
SCALAR_TYPES = ("str", "path", "int", "float", "bool")


class Use(NamedTuple):
    """A role that a play runs on some hosts, with the variables that the play gives it."""

    role: str
    hosts: list[str]
    given: Mapping[str, Any]
    playbook: str


class Problems:
    """Collects problems; one that many hosts share is told once."""

    def __init__(self, all_hosts: Iterable[str]) -> None:
        self._all = set(all_hosts)
        self._found: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, subject: str, text: str, host: str = "") -> None:
        """Notes that something is wrong with `subject` (on one host, or everywhere)."""
        hosts = self._found[subject, text]
        # A role that several plays run on a host asks as often.
        if host not in hosts:
            hosts.append(host)

    def lines(self) -> list[str]:
        """Returns one line per problem, sorted."""
        return sorted(f"{subject}{self._where(hosts)}: {text}" for (subject, text), hosts in self._found.items())

    def _where(self, hosts: list[str]) -> str:
        if hosts == [""]:
            return ""
        if len(hosts) > 1 and set(hosts) == self._all:
            return " (all hosts)"
        return f" ({', '.join(hosts[:4])}{f' and {len(hosts) - 4} more' if len(hosts) > 4 else ''})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a hint at the nearest known word, empty when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def type_error(value: Any, option: Mapping[str, Any]) -> str:
    """Returns what is wrong with a value by its option (an entry of an argument spec), empty when nothing is.

    Ansible converts before it checks, but roles see the value as it stands in the inventory. So what a conversion would
    change in kind (a string that stands for a list, a list that stands for a string) is an error here.
    """
    kind = option.get("type", "str")
    if kind == "list" and (isinstance(value, (str, Mapping)) or not isinstance(value, Sequence)):
        return f"must be a list, got {value!r}"
    if kind == "dict" and not isinstance(value, Mapping):
        return f"must be a dictionary, got {value!r}"
    if kind in SCALAR_TYPES and isinstance(value, (Mapping, list, tuple)):
        return f"must be of type {kind}, got {value!r}"
    if kind == "list" and option.get("elements") in (*SCALAR_TYPES, "dict"):
        wrong = (type_error(item, {"type": option["elements"]}) for item in value)
        return next((f"each item {text}" for text in wrong if text), "")
    return ""


def value_errors(name: str, value: Any, option: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the value of a variable, by its option."""
    if text := type_error(value, option):
        return [text]
    spec = {key: entry for key, entry in option.items() if key not in ("required", "needs")}
    found = ArgumentSpecValidator({name: spec}).validate({name: value}).error_messages
    if found and option.get("no_log"):
        return ["wrong value (not shown)"]
    if found and spec.get("type") in SCALAR_TYPES and "choices" not in spec:
        return [f"must be of type {spec['type']}, got {value!r}"]
    return [text.removeprefix(f"value of {name} ") for text in found]


def placeholder(value: Any) -> str:
    """Returns the first text in the value, however deep, that still has a placeholder; empty when none has."""
    if isinstance(value, str):
        return value if PLACEHOLDER in value else ""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next(filter(None, map(placeholder, items)), "")


def check_groups(wanted: Mapping[str, Any], groups: Mapping[str, list[str]], problems: Problems) -> None:
    """Checks that groups exist, have enough hosts and contain each other as the schema says."""
    unused = [group for group in groups if group not in wanted]
    for group, rule in wanted.items():
        subject = f"group {group} ({rule['description']})"
        if group not in groups:
            near = get_close_matches(group, unused, n=1, cutoff=0.75)
            needed = f"add it with {rule['min']} or more hosts" if rule.get("min") else "add it, empty if there is none"
            problems.add(subject, f"missing: {f'is it {near[0]}, misspelt?' if near else needed}")
            continue
        count = len(groups[group])
        if count < rule.get("min", 0):
            problems.add(subject, f"has {count} hosts, needs at least {rule['min']}")
        if count > rule.get("max", count):
            problems.add(subject, f"has {count} hosts ({', '.join(groups[group])}), may have {rule['max']}")
        for part in rule.get("contains", []):
            for host in groups.get(part, []):
                if host not in groups[group]:
                    problems.add(subject, f"must contain what is in {part}", host)


def plays(playbook: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the plays of a playbook and of those that it imports, each with the file that it stands in."""
    for play in yaml.safe_load(playbook.read_text()):
        imported = play.get("import_playbook") or play.get("ansible.builtin.import_playbook")
        if imported:
            yield from plays(playbook.parent / imported)
        else:
            yield playbook, play


def read_options(roles_dir: Path) -> dict[str, dict[str, Any]]:
    """Returns the options of every role's entry points, by role."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(roles_dir.glob("*/meta/argument_specs.yml")):
        specs = yaml.safe_load(file.read_text())["argument_specs"]
        found[file.parent.parent.name] = {k: v for spec in specs.values() for k, v in spec.get("options", {}).items()}
    return found


class ActionModule(ActionBase):
    """See DOCUMENTATION."""

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the problems; finding some is no failure of the task."""
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {name: {"type": "path", "required": True} for name in ("playbook", "roles_dir", "schema")}
        )
        self._vars = task_vars or {}
        groups = {group: list(hosts) for group, hosts in self._vars["groups"].items()}
        hosts = list(self._vars["groups"]["all"])
        schema = yaml.safe_load(Path(arguments["schema"]).read_text())
        roles = read_options(Path(arguments["roles_dir"]))
        uses = list(self._uses(Path(arguments["playbook"])))

        problems = Problems(hosts)
        check_groups(schema["groups"], groups, problems)
        self._unreadable: set[str] = set()
        known = {name for options in roles.values() for name in options}
        values = {host: self._values(host, known, problems) for host in hosts}
        check_names(values, schema["variables"], roles, problems)
        check_values(values, schema["variables"], roles, problems)
        check_required(values, schema["variables"], roles, uses, problems)
        check_needs(values, schema["variables"], groups, problems)
        check_given(values, uses, set(load_extra_vars(self._loader)), problems)
        return {**result, "changed": False, "problems": problems.lines(), "unreadable": sorted(self._unreadable)}

    def _uses(self, playbook: Path) -> Iterator[Use]:
        matching = lookup_loader.get("ansible.builtin.inventory_hostnames", loader=self._loader, templar=self._templar)
        for file, play in plays(playbook):
            for entry in play.get("roles", []):
                entry = {"role": entry} if isinstance(entry, str) else entry
                hosts = matching.run([play["hosts"]], variables=self._vars)
                yield Use(entry["role"], hosts, entry.get("vars", {}), str(file.relative_to(playbook.parent)))

    def _values(self, host: str, known: set[str], problems: Problems) -> dict[str, Any]:
        """Returns the host's inventory variables, evaluated; `None` for one that needs facts or a role's default."""
        raw = self._vars["hostvars"].raw_get(host)
        templar = self._templar.copy_with_new_env(available_variables={**raw, "hostvars": self._vars["hostvars"]})
        values = {}
        for name in raw:
            if name.startswith("ansible_") and not name.startswith(("ansible_host", "ansible_user", "ansible_port")):
                continue
            try:
                values[name] = templar.template(raw[name])
            except AnsibleError as error:
                values[name] = None
                reason = str(error).splitlines()[0]
                missing = re.findall(r"'(\w+)' is undefined", reason)
                if "ansible_facts" in str(raw[name]) or known.intersection(missing):
                    continue
                problems.add(name, f"cannot be evaluated: {reason}", host)
                if name.startswith("ansible_"):
                    self._unreadable.add(host)
        return values


Values = Mapping[str, Mapping[str, Any]]
Options = Mapping[str, Any]


def check_names(values: Values, cluster: Options, roles: Mapping[str, Options], problems: Problems) -> None:
    """Checks that a variable named like a role's (or nearly so) is one that the role has."""
    known = {name for options in roles.values() for name in options} | set(cluster)
    prefixes = {f"{role}_": role for role in roles}
    for host, variables in values.items():
        for name in variables:
            if name in known or name.startswith("ansible_"):
                continue
            owner = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")
            if name.startswith("ictx_"):
                problems.add(name, f"unknown variable of the cluster{did_you_mean(name, cluster)}", host)
            elif owner:
                hint = did_you_mean(name, roles[prefixes[owner]]) or did_you_mean(name, known)
                problems.add(name, f"unknown variable of the role {prefixes[owner]}{hint}", host)
            elif near := get_close_matches(name, known, n=1, cutoff=0.9):
                problems.add(name, f"no role has this variable; did you mean {near[0]}?", host)


def check_values(values: Values, cluster: Options, roles: Mapping[str, Options], problems: Problems) -> None:
    """Checks types, choices and placeholders, and that what belongs to the whole cluster is the same everywhere."""
    options = {name: option for entries in roles.values() for name, option in entries.items()} | dict(cluster)
    for host, variables in values.items():
        for name, value in variables.items():
            if name not in options or value is None:
                continue
            if text := placeholder(value):
                problems.add(name, f"replace {PLACEHOLDER} in {text}", host)
                continue
            for text in value_errors(name, value, options[name]):
                problems.add(name, text, host)
    for name in cluster:
        told = {repr(variables[name]) for variables in values.values() if name in variables}
        if len(told) > 1:
            problems.add(name, f"must be the same on every host, got {', '.join(sorted(told))}")


def check_required(
    values: Values, cluster: Options, roles: Mapping[str, Options], uses: list[Use], problems: Problems
) -> None:
    """Checks that each host has the variables which the cluster and its roles need, unless the play gives them."""
    for host, variables in values.items():
        for name, option in cluster.items():
            if option.get("required") and name not in variables:
                problems.add(name, f"missing; it is needed: {option['description']}", host)
    for use in uses:
        for name, option in roles.get(use.role, {}).items():
            if not option.get("required") or name in use.given:
                continue
            for host in use.hosts:
                if name not in values.get(host, {name: None}):
                    problems.add(name, f"missing; role {use.role} needs it: {option['description']}", host)


def check_needs(values: Values, cluster: Options, groups: Mapping[str, list[str]], problems: Problems) -> None:
    """Checks that a group has a host where a variable's value needs one."""
    for host, variables in values.items():
        for name in cluster.keys() & variables.keys():
            group = cluster[name].get("needs", {}).get(str(variables[name]))
            if group and not groups.get(group):
                problems.add(name, f"{variables[name]} needs a host in the group {group}", host)


def check_given(values: Values, uses: list[Use], extra: set[str], problems: Problems) -> None:
    """Checks that the inventory does not set what a play sets anyway: the value would be silently ignored."""
    for use in uses:
        for name in set(use.given) - extra:
            for host in use.hosts:
                if name in values.get(host, {}):
                    problems.add(name, f"has no effect: {use.playbook} sets it to {use.given[name]}", host)
