"""Tasks use only module options of the locked Ansible; an unknown option would fail only on the node."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT

NESTED = ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "handlers")
COLLECTIONS = ("ansible.", "community.", "containers.", "kubernetes.", "grafana.")


def calls(tasks: Any) -> Iterator[tuple[str, set[str]]]:
    """Yields the module and its options of each task, at any depth."""
    for task in tasks if isinstance(tasks, list) else []:
        for name, options in task.items():
            if name in NESTED:
                yield from calls(options)
            elif name.startswith(COLLECTIONS) and isinstance(options, dict):
                yield name, set(options)


def test_every_option_of_a_module_is_known_to_the_locked_ansible() -> None:
    found: dict[str, list[tuple[Path, set[str]]]] = {}
    for file in [*ROOT.glob("roles/*/*/*.yml"), *ROOT.glob("playbooks/**/*.yml")]:
        if file.parent.name in ("defaults", "vars", "meta", "plugins", "files"):
            continue
        for module, options in calls(yaml.safe_load(file.read_text())):
            found.setdefault(module, []).append((file.relative_to(ROOT), options))
    assert len(found) > 20
    done = subprocess.run(["ansible-doc", "--json", *found], cwd=ROOT, capture_output=True, text=True, check=True)
    described = json.loads(done.stdout)
    unknown = []
    for module, uses in found.items():
        # Actions with arbitrary options (set_fact), and Ansible's built-in ones, describe no options.
        known = described.get(module, {}).get("doc", {}).get("options", {})
        names = {*known, *(alias for option in known.values() for alias in option.get("aliases", []))}
        free = not known or module.split(".")[-1] in ("set_fact", "command", "shell", "add_host")
        unknown += [
            f"{file}: {module}: {', '.join(options - names)}" for file, options in uses if not free and options - names
        ]
    assert unknown == []


def documentation() -> Iterator[tuple[str, str]]:
    """Yields the name and text of each DOCUMENTATION, EXAMPLES and RETURN of our plug-ins."""
    for file in sorted([*ROOT.glob("playbooks/plugins/*/*.py"), *ROOT.glob("roles/*/library/*.py")]):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for name in {"DOCUMENTATION", "EXAMPLES", "RETURN"} & {getattr(node.targets[0], "id", "")}:
                    yield f"{file.stem} {name}", str(node.value.value)


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in documentation()])
def test_documentation_of_our_plugins_is_yaml(text: str) -> None:
    """ansible-doc cannot show a plug-in whose documentation it cannot parse."""
    assert yaml.safe_load(text)
