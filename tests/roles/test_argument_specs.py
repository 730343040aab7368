"""Every role documents and validates its variables: its argument specs list all of them, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT

ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())


def load(file: Path) -> dict[str, Any]:
    """Returns the content of a YAML file, empty if it does not exist."""
    return (yaml.safe_load(file.read_text()) if file.exists() else None) or {}


def options(role: Path) -> dict[str, Any]:
    """Returns the options of all the role's entry points."""
    specs = load(role / "meta/argument_specs.yml")["argument_specs"].values()
    return {name: option for spec in specs for name, option in spec.get("options", {}).items()}


@pytest.fixture(params=ROLES, ids=lambda path: path.name)
def role(request: pytest.FixtureRequest) -> Path:
    """Returns each role's folder."""
    return request.param


def test_every_default_has_an_option(role: Path) -> None:
    assert set(load(role / "defaults/main.yml")) <= set(options(role))


def test_every_optional_option_has_a_default_or_belongs_to_hosts(role: Path) -> None:
    # The lab's volumes and ports are read through hostvars, which do not include defaults of roles.
    through_hostvars = {"lab": {"lab_volumes", "lab_publish"}}
    without = {name for name, option in options(role).items() if not option.get("required")}
    assert without - set(load(role / "defaults/main.yml")) == through_hostvars.get(role.name, set())


def test_every_option_is_public_described_and_named_after_the_role(role: Path) -> None:
    for name, option in options(role).items():
        assert name.startswith(f"{role.name}_"), name
        assert option["description"], name


def test_every_option_is_used(role: Path) -> None:
    code = "\n".join(
        file.read_text()
        for folder in ("tasks", "templates", "handlers", "vars", "defaults")
        for file in (role / folder).rglob("*")
        if file.is_file()
    )
    unused = [
        name
        for name in options(role)
        if len(re.findall(rf"(?<!\w){name}\b", code)) < (2 if f"\n{name}:" in code else 1)
    ]
    assert unused == []


def test_defaults_are_sorted_and_explained(role: Path) -> None:
    file = role / "defaults/main.yml"
    names = list(load(file))
    assert names == sorted(names)
    text = file.read_text() if names else ""
    for paragraph in re.split(r"\n\s*\n", text.removeprefix("---\n").strip()):
        assert not paragraph or paragraph.startswith("#"), f"{role.name}: no comment above {paragraph[:60]!r}"


def test_tasks_are_named_and_internal_variables_too(role: Path) -> None:
    for name in load(role / "vars/main.yml"):
        assert name.startswith(f"_{role.name}_"), name
