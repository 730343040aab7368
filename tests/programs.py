"""Programs that the platform runs: this machine's, else the distribution's, unpacked; and our own, as modules."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import yaml

CACHE = Path(os.environ.get("ICTX_CACHE", Path.home() / ".cache/ictx"))
PACKAGES = {
    "amtool": "prometheus-alertmanager",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "restic": "restic",
}


def program(name: str) -> str:
    """Returns the path of a program. Nothing is installed: a package is unpacked into the cache."""
    found = shutil.which(name)
    if found:
        return found
    folder = CACHE / "packages" / PACKAGES[name]
    path = folder / "usr/bin" / name
    if not path.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            subprocess.run(["apt-get", "download", "-qq", PACKAGES[name]], cwd=draft, check=True, capture_output=True)
            (package,) = Path(draft).glob("*.deb")
            subprocess.run(["dpkg", "-x", package, f"{draft}/root"], check=True)
            shutil.rmtree(folder, ignore_errors=True)
            Path(draft, "root").rename(folder)
    return str(path)


def loaded(path: Path) -> types.ModuleType:
    """Returns a Python program of ours as a module, executed anew; its name has no suffix to import it by."""
    loader = SourceFileLoader(path.name.replace("-", "_"), str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    # Dataclasses look for the module that they are defined in.
    sys.modules[loader.name] = module
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def play(folder: Path, tasks: list[dict[str, Any]], variables: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Runs tasks on this machine."""
    file = folder / "play.yml"
    told = {**variables, "ansible_python_interpreter": sys.executable}
    start = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": told, "tasks": tasks}
    file.write_text(yaml.safe_dump([start]))
    return subprocess.run(
        ["ansible-playbook", "-i", "localhost,", str(file)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
