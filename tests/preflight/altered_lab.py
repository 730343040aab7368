"""Preflight on the lab's inventory with other variables and hosts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cluster import ROOT
from test_check_inventory import problems


def found(folder: Path, variables: dict[str, Any], hosts: Callable[[Any], None] | None = None) -> set[str]:
    """Returns the problems of a copy of the lab's inventory with other variables and hosts."""
    copy = shutil.copytree(ROOT / "inventories/lab", folder / "inventory")
    (copy / "group_vars/all/zz_test.yml").write_text(yaml.safe_dump(variables))
    if hosts:
        file = copy / "hosts.yml"
        content = yaml.safe_load(file.read_text())
        hosts(content["all"]["children"])
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    return set(problems(copy))
