"""Ansible action: validates an inventory against the roles' argument specs and the schema; reports every problem."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import filter_loader, lookup_loader
from ansible.utils.vars import load_extra_vars

DOCUMENTATION = r"""
action: check_inventory
short_description: Compares a whole inventory with the roles' argument specs and the schema
description:
  - Reads only, and on the control host only. Every problem is one line of RV(problems) that names the variable or
    group, the hosts and what is allowed.
options:
  playbook: {type: path, required: true, description: Playbook whose imports name the roles that will run.}
  roles_dir: {type: path, required: true, description: Folder of the roles.}
  schema: {type: path, required: true, description: File with the variables and groups of the whole cluster.}
  formats: {type: path, required: true, description: File with what text and numbers may look like, by variable.}
author: [InfiniteContext]
"""

PLACEHOLDER = "CHANGE-ME"
CONNECTION = ("ansible_connection", "ansible_host", "ansible_port", "ansible_user")
SCALAR_TYPES = ("str", "path", "int", "float", "bool")
# Deeper than any sensible value, and well below Python's recursion limit.
DEEPEST = 30
LONGEST_SHOWN = 100  # characters


class Unknown:
    """Marks a value that depends on facts or on a role's defaults."""


UNKNOWN = Unknown()


class Use(NamedTuple):
    """A role that a play runs on some hosts, with the variables that the play sets for it."""

    role: str
    hosts: list[str]
    given: Mapping[str, Any]
    playbook: str


class Problems:
    """Collects problems; a problem of several hosts is reported once."""

    def __init__(self, all_hosts: Iterable[str]) -> None:
        self._all = set(all_hosts)
        self._found: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, subject: str, text: str, host: str = "") -> None:
        """Adds a problem of `subject`, on one host or on the whole cluster."""
        hosts = self._found[printable(subject), printable(text)]
        # Several plays may run the same role on a host, and each validates it.
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
    """Returns a hint with the closest known word, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def printable(text: str) -> str:
    """Returns the text on one line; line breaks and control characters are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: Any) -> str:
    """Returns a value for a message; Python cannot print integers of more than 4,300 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


class Formats:
    """Allowed formats of text and numbers by variable (inventory_formats.yml)."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._formats = content["formats"]
        self._types = content["types"]
        self._rules = [(rule["match"], rule["format"]) for rule in content["variables"]]
        self._keys = [(rule["match"], rule["format"]) for rule in content["keys"]]
        self.unique: Mapping[str, list[str]] = content["unique"]
        self._wholes: Mapping[str, str] = content["wholes"]
        self.connection: Options = content["connection"]
        self.name_of = cache(self._name_of)

    def _name_of(self, path: str, kind: str) -> str:
        named = (form for pattern, form in self._rules if fnmatchcase(path, pattern))
        return next(named, self._types.get(kind, "word"))

    def key_error(self, path: str, key: str) -> str:
        """Returns the error in a dictionary key, or an empty string."""
        if self.name_of(path, "free") == "multiline":
            return ""
        return self.text_error(next((form for pattern, form in self._keys if fnmatchcase(path, pattern)), "key"), key)

    def whole_errors(self, name: str, value: Any) -> list[str]:
        """Returns the errors that the variable's own filter finds."""
        return list(filter_loader.get(self._wholes[name]).j2_function(value)) if name in self._wholes else []

    def text_error(self, form: str, text: str) -> str:
        """Returns the error in a text, or an empty string."""
        rule = self._formats[form]
        # A number in quotes, or from the command line.
        if "pattern" not in rule:
            digits = re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", text, re.ASCII)
            return (
                self.number_error(form, float(text)) if digits else f"must be {rule['description']}, got {shown(text)}"
            )
        sound = re.fullmatch(rule["pattern"], text) and text.lower() not in rule.get("reserved", ())
        found = re.findall(r":([0-9]+)(?=/|$)", text) if sound and rule.get("ports") else []
        if outside := [port for port in found if not 0 < int(port) < 65536]:
            return f"has the port {outside[0]}, must be from 1 to 65535, got {shown(text)}"
        return "" if sound else f"must be {rule['description']}, got {shown(text)}"

    def number_error(self, form: str, value: float) -> str:
        """Returns the error in a number, or an empty string."""
        rule = self._formats[form]
        # Text that YAML parses as a number, such as the version 580.
        if "pattern" in rule:
            readable = type(value) is int and abs(value) < 10**18 and not rule.get("quoted")
            return self.text_error(form, str(value)) if readable else QUOTE
        sound = rule["min"] <= value <= rule["max"] and value not in rule.get("reserved", ())
        return "" if sound else f"must be {rule['description']}, got {shown(value)}"


QUOTE = "must be text: put it in quotes"


def kind_error(kind: str, value: Any) -> str:
    """Returns the error in the type of a value, or an empty string.

    Ansible converts values before it validates them, but roles use the unconverted value. So a value that would need a
    conversion (a string to a list, a list to a string) is an error here.
    """
    text, number = isinstance(value, str), isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "list":
        return (
            ""
            if isinstance(value, Sequence) and not isinstance(value, (str, bytes))
            else f"must be a list, got {shown(value)}"
        )
    if kind == "dict":
        return "" if isinstance(value, Mapping) else f"must be a dictionary, got {shown(value)}"
    right = {
        "bool": isinstance(value, (bool, str)),
        "float": text or number,
        "int": text or (number and not isinstance(value, float)),
    }.get(kind, text or number)
    if right:
        return ""
    return (
        QUOTE if kind in ("str", "path") and isinstance(value, bool) else f"must be of type {kind}, got {shown(value)}"
    )


def value_errors(path: str, value: Any, option: Mapping[str, Any], formats: Formats, depth: int = 0) -> Iterator[str]:
    """Yields the errors in a value, at any depth, according to its option (an entry of an argument spec).

    Args:
        path: name of the variable, followed by the keys of a nested value.
        value: the value.
        option: its option; nested values without one, or of type `raw`, are free.
        formats: allowed formats of text and numbers.
        depth: nesting depth of the value.
    """
    kind = option.get("type", "str")
    if depth > DEEPEST:
        yield f"is nested more than {DEEPEST} levels deep"
    elif value is None:
        yield from [] if kind == "free" else ["has no value: set one, or remove it"]
    elif kind in ("free", "raw"):
        yield from free_errors(path, value, kind, formats, depth)
    elif text := kind_error(kind, value):
        yield text
    elif kind == "list":
        item = {"type": option.get("elements", "free"), "options": option.get("options", {})}
        for text in dict.fromkeys(
            text for part in value for text in value_errors(path, part, item, formats, depth + 1)
        ):
            yield f"each item {text}"
    elif kind == "dict":
        for key, part in value.items():
            inner = option.get("options", {}).get(key, {"type": "free"}) if isinstance(key, str) else {}
            yield from part_errors(path, key, part, inner, formats, depth)
    elif kind == "bool":
        return
    elif option.get("required") and value == "":
        yield "is empty"
    else:
        form = formats.name_of(path, kind)
        text = formats.text_error(form, value) if isinstance(value, str) else formats.number_error(form, value)
        yield from [text] if text else []


def part_errors(
    path: str, key: Any, part: Any, option: Mapping[str, Any], formats: Formats, depth: int
) -> Iterator[str]:
    """Yields the errors in a dictionary key and its value."""
    if not isinstance(key, str):
        yield f"has the key {shown(key)}: {QUOTE}"
    elif text := formats.key_error(path, key):
        yield f"has the key {shown(key)}: {text}"
    else:
        for text in value_errors(f"{path}.{key}", part, option, formats, depth + 1):
            yield f"{key} {text}"


def free_errors(path: str, value: Any, kind: str, formats: Formats, depth: int) -> Iterator[str]:
    """Yields the errors in a value without a declared type, or of type `raw` (text or a list of texts)."""
    if isinstance(value, Mapping) and kind == "free":
        yield from value_errors(path, value, {"type": "dict"}, formats, depth)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        yield from value_errors(
            path, value, {"type": "list", "elements": "str" if kind == "raw" else "free"}, formats, depth
        )
    elif isinstance(value, str):
        yield from filter(None, [formats.text_error(formats.name_of(path, kind), value)])
    elif kind == "raw":
        yield f"must be text or a list, got {shown(value)}"
    elif not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        yield f"must be text, a number, a list or a dictionary, got {shown(value)}"


def declared_errors(name: str, value: Any, option: Mapping[str, Any], formats: Formats) -> list[str]:
    """Returns the errors in a variable's value: those in its parts, otherwise those of choices and similar rules."""
    found = list(dict.fromkeys(value_errors(name, value, option, formats)))
    if not found:
        spec = {key: entry for key, entry in option.items() if key not in ("required", "needs")}
        found = ArgumentSpecValidator({name: spec}).validate({name: value}).error_messages
        if found and spec.get("type") in SCALAR_TYPES and "choices" not in spec:
            found = [f"must be of type {spec['type']}, got {shown(value)}"]
    if found and option.get("no_log"):
        return ["invalid value (secret, not shown)"]
    return [text.removeprefix(f"value of {name} ") for text in found]


def placeholder(value: Any, depth: int = 0) -> str:
    """Returns the first text in the value that still has a placeholder; empty if there is none."""
    if isinstance(value, str):
        return value if PLACEHOLDER in value else ""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((text for item in items if depth < DEEPEST and (text := placeholder(item, depth + 1))), "")


def check_groups(wanted: Mapping[str, Any], groups: Mapping[str, list[str]], problems: Problems) -> None:
    """Checks that groups exist, have enough hosts and contain each other as the schema requires."""
    unused = [group for group in groups if group not in wanted]
    for group, rule in wanted.items():
        subject = f"group {group} ({rule['description']})"
        if group not in groups:
            near = get_close_matches(group, unused, n=1, cutoff=0.75)
            needed = (
                f"add it with {rule['min']} or more hosts"
                if rule.get("min")
                else "add it; leave it empty if there are no such hosts"
            )
            problems.add(subject, f"missing: {f'rename {near[0]}, if that is a misspelling' if near else needed}")
            continue
        count = len(groups[group])
        if count < rule.get("min", 0):
            problems.add(subject, f"has {count} hosts, needs at least {rule['min']}")
        if count > rule.get("max", count):
            problems.add(subject, f"has {count} hosts ({', '.join(groups[group])}), may have at most {rule['max']}")
        for part in rule.get("contains", []):
            for host in groups.get(part, []):
                if host not in groups[group]:
                    problems.add(subject, f"must contain all hosts of {part}", host)


def check_hosts(hosts: Iterable[str], groups: Iterable[str], formats: Formats, problems: Problems) -> None:
    """Checks the names of hosts and groups, which end up in configuration files and shells."""
    for kind, form, names in (("host", "host", hosts), ("group", "key", groups)):
        for name in names:
            if text := formats.text_error(form, str(name)):
                problems.add(f"{kind} {shown(name)}", f"its name {text}")


@cache
def read(file: Path) -> Any:
    """Returns the content of a YAML file of the project."""
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def plays(playbook: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the plays of a playbook and of the playbooks that it imports, each with its file."""
    for play in read(playbook):
        imported = play.get("import_playbook") or play.get("ansible.builtin.import_playbook")
        if imported:
            yield from plays(playbook.parent / imported)
        else:
            yield playbook, play


def read_options(roles_dir: Path) -> dict[str, dict[str, Any]]:
    """Returns the options of every role's entry points, by role."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(roles_dir.glob("*/meta/argument_specs.yml")):
        specs = read(file)["argument_specs"]
        found[file.parent.parent.name] = {k: v for spec in specs.values() for k, v in spec.get("options", {}).items()}
    return found


class ActionModule(ActionBase):
    """See DOCUMENTATION."""

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the problems; the task succeeds even if there are some."""
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {name: {"type": "path", "required": True} for name in ("playbook", "roles_dir", "schema", "formats")}
        )
        self._vars = task_vars or {}
        groups = {group: list(hosts) for group, hosts in self._vars["groups"].items()}
        hosts = list(self._vars["groups"]["all"])
        schema = read(Path(arguments["schema"]))
        formats = Formats(read(Path(arguments["formats"])))
        roles = read_options(Path(arguments["roles_dir"]))
        uses = list(self._uses(Path(arguments["playbook"])))

        problems = Problems(hosts)
        check_groups(schema["groups"], groups, problems)
        check_hosts(hosts, groups, formats, problems)
        folders = {own.get("inventory_dir") for own in map(self._vars["hostvars"].raw_get, hosts)} - {None}
        for file, text in filter_loader.get("stray_variable_files").j2_function(folders, groups, hosts):
            problems.add(file, text)
        self._unreadable: set[str] = set()
        known = {name for options in roles.values() for name in options}
        values = {host: self._values(host, known, problems) for host in hosts}
        check_names(values, {**schema["variables"], **formats.connection}, roles, problems)
        options = {name: option for entries in roles.values() for name, option in entries.items()} | schema["variables"]
        wrong = check_values(values, options, formats, problems)
        check_same(values, schema["variables"], wrong, problems)
        check_required(values, schema["variables"], roles, uses, problems)
        check_needs(values, schema["variables"], groups, problems)
        check_given(values, uses, set(load_extra_vars(self._loader)), problems)
        right = completed(values, wrong, uses, Path(arguments["roles_dir"]))
        check_meaning(right, groups, problems)
        units = read(Path(arguments["playbook"]).parent / "playbooks/vars/units.yml")["cluster_units"]
        check_dropins(right, units, problems)
        self._unreadable |= {host for host, name in wrong if name in formats.connection}
        accepted = {
            name: values[host][name]
            for host in hosts
            for name in schema["variables"].keys() & values[host].keys()
            if (host, name) not in wrong and values[host][name] is not UNKNOWN
        }
        return {
            **result,
            "changed": False,
            "problems": problems.lines(),
            "unreadable": sorted(self._unreadable),
            "accepted": accepted,
            "apt_pins": {host: own["common_apt_pins"] for host, own in right.items() if own.get("common_apt_pins")},
            "slurm_state_dirs": {
                host: right[host]["slurm_state_dir"]
                for host in groups.get("slurm_controller", [])
                if "slurm_state_dir" in right.get(host, {})
            },
            "hardware": filter_loader.get("declared_by_node").j2_function(right, groups),
        }

    def _uses(self, playbook: Path) -> Iterator[Use]:
        matching = lookup_loader.get("ansible.builtin.inventory_hostnames", loader=self._loader, templar=self._templar)
        for file, play in plays(playbook):
            shared = {
                name: value for path in play.get("vars_files", []) for name, value in read(file.parent / path).items()
            }
            for entry in play.get("roles", []):
                entry = {"role": entry} if isinstance(entry, str) else entry
                hosts = matching.run([play["hosts"]], variables=self._vars)
                given = shared | entry.get("vars", {})
                yield Use(entry["role"], hosts, given, str(file.relative_to(playbook.parent)))

    def _values(self, host: str, known: set[str], problems: Problems) -> dict[str, Any]:
        """Returns the host's evaluated variables; UNKNOWN for those that depend on facts or a role's default."""
        raw = self._vars["hostvars"].raw_get(host)
        templar = self._templar.copy_with_new_env(available_variables={**raw, "hostvars": self._vars["hostvars"]})
        values = {}
        for name in raw:
            if not isinstance(name, str):
                problems.add(f"variable {shown(name)}", "its name must be text", host)
                continue
            if name.startswith("ansible_") and name not in CONNECTION:
                continue
            try:
                values[name] = templar.template(raw[name])
            # Filters may raise any exception, and endless nesting raises RecursionError.
            except Exception as error:
                values[name] = UNKNOWN
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                missing = re.findall(r"'(\w+)' is undefined", reason)
                if "ansible_facts" in str(raw[name]) or known.intersection(missing):
                    continue
                problems.add(name, f"cannot be evaluated: {reason}", host)
                if name.startswith("ansible_"):
                    self._unreadable.add(host)
        return values


Values = Mapping[str, Mapping[str, Any]]
Options = Mapping[str, Any]


def completed(values: Values, wrong: set[tuple[str, str]], uses: list[Use], roles_dir: Path) -> Values:
    """Returns each host's valid values, with its roles' defaults except for templated ones.

    `_listening` has the names of the variables that set the ports on which the host's roles listen.
    """
    found = {
        host: {name: value for name, value in own.items() if (host, name) not in wrong and value is not UNKNOWN}
        for host, own in values.items()
    }
    for use in uses:
        file = roles_dir / use.role / "defaults/main.yml"
        defaults = (read(file) if file.exists() else None) or {}
        plain = {name: value for name, value in defaults.items() if "{{" not in str(value)}
        listening = {name for name in defaults if name.endswith(("_listen", "_port"))}
        for host in use.hosts:
            if host in found:
                found[host] = {
                    **{name: value for name, value in plain.items() if name not in values[host]},
                    **found[host],
                    "_listening": found[host].get("_listening", set()) | listening,
                }
    return found


def check_meaning(values: Values, groups: Mapping[str, list[str]], problems: Problems) -> None:
    """Checks the values against each other (filter/meaning.py)."""
    for subject, text, host in filter_loader.get("meaning_problems").j2_function(values, groups):
        problems.add(subject, text, host)


def check_dropins(values: Values, units: Mapping[str, Any], problems: Problems) -> None:
    """Checks that ictx_unit_dropins names only units of the platform (filter/unit_dropins.py)."""
    dropins = next((own["ictx_unit_dropins"] for own in values.values() if own.get("ictx_unit_dropins")), {})
    for text in filter_loader.get("dropin_problems").j2_function(dropins, units):
        problems.add("ictx_unit_dropins", text)


def check_names(values: Values, cluster: Options, roles: Mapping[str, Options], problems: Problems) -> None:
    """Checks that a variable with a role's prefix, or close to one of its names, exists in the role."""
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


def check_values(values: Values, options: Options, formats: Formats, problems: Problems) -> set[tuple[str, str]]:
    """Checks types, formats, choices and placeholders; returns host and name of each wrong value."""
    wrong = set()
    for host, variables in values.items():
        for name, value in variables.items():
            option = options.get(name) or formats.connection.get(name)
            if option is None or value is UNKNOWN:
                continue
            if text := placeholder(value):
                found = [f"replace {PLACEHOLDER} in {text}"]
            else:
                found = declared_errors(name, value, option, formats) or duplicates(name, value, formats)
                found = found or formats.whole_errors(name, value)
            for text in found:
                problems.add(name, text, host)
                wrong.add((host, name))
    return wrong


def duplicates(name: str, value: Any, formats: Formats) -> list[str]:
    """Returns the items of a list that share a value that must be unique."""
    found = []
    for key in formats.unique.get(name, ()):
        counts = Counter(str(item[key]) for item in value if key in item)
        found += [f"{count} items have the {key} {text}" for text, count in counts.items() if count > 1]
    return found


def check_same(values: Values, cluster: Options, wrong: set[tuple[str, str]], problems: Problems) -> None:
    """Checks that variables of the whole cluster have the same value on every host."""
    for name in cluster:
        found = {shown(values[host][name]) for host in values if name in values[host] and (host, name) not in wrong}
        if len(found) > 1:
            problems.add(name, f"must be the same on every host, got {', '.join(sorted(found))}")


def check_required(
    values: Values, cluster: Options, roles: Mapping[str, Options], uses: list[Use], problems: Problems
) -> None:
    """Checks that each host has the variables that the cluster and its roles require, unless the play sets them."""
    for host, variables in values.items():
        for name, option in cluster.items():
            if option.get("required") and name not in variables:
                problems.add(name, f"missing, but required: {option['description']}", host)
    for use in uses:
        for name, option in roles.get(use.role, {}).items():
            if not option.get("required") or name in use.given:
                continue
            for host in use.hosts:
                if name not in values.get(host, {name: UNKNOWN}):
                    problems.add(name, f"missing, but required by the role {use.role}: {option['description']}", host)


def check_needs(values: Values, cluster: Options, groups: Mapping[str, list[str]], problems: Problems) -> None:
    """Checks that groups which a variable's value requires have hosts."""
    for host, variables in values.items():
        for name in cluster.keys() & variables.keys():
            group = cluster[name].get("needs", {}).get(variables[name] if isinstance(variables[name], str) else "")
            if group and not groups.get(group):
                problems.add(name, f"{variables[name]} needs a host in the group {group}", host)


def check_given(values: Values, uses: list[Use], extra: set[str], problems: Problems) -> None:
    """Checks that the inventory does not set variables that a play sets: they would be silently ignored."""
    for use in uses:
        for name in set(use.given) - extra:
            for host in use.hosts:
                if name in values.get(host, {}):
                    problems.add(name, f"has no effect: {use.playbook} sets it to {use.given[name]}", host)
