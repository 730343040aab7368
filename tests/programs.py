"""Programs of the platform: from this machine, or unpacked from the distribution's packages; and ours as modules."""

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
    "amtool": ["prometheus-alertmanager"],
    "docker-registry": ["docker-registry"],
    "etcd": ["etcd-server"],
    "nft": ["nftables", "libnftables1", "libnftnl11", "libjansson4", "libmnl0"],
    "prometheus": ["prometheus"],
    "promtool": ["prometheus"],
    "restic": ["restic"],
    "skopeo": ["skopeo"],
}


def program(name: str) -> str:
    """Returns the path of a program; unpacks missing packages into the cache, without installation (`libraries`)."""
    found = shutil.which(name)
    if found:
        return found
    packages = PACKAGES[name]
    folder = CACHE / "packages" / packages[0]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            subprocess.run(["apt-get", "download", "-qq", *packages], cwd=draft, check=True, capture_output=True)
            for package in Path(draft).glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, f"{draft}/root"], check=True)
            Path(draft, "root").rename(folder)
    (path,) = (path for place in ("usr/bin", "usr/sbin") if (path := folder / place / name).exists())
    return str(path)


def libraries(path: str) -> dict[str, str]:
    """Returns the environment in which an unpacked program finds its libraries."""
    found = [str(folder) for folder in Path(path).parents[1].glob("lib/*-linux-gnu")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(found)} if str(CACHE) in path else {**os.environ}


def loaded(path: Path) -> types.ModuleType:
    """Executes a Python program of ours and returns it as a module; its name has no suffix for an import."""
    loader = SourceFileLoader(path.name.replace("-", "_"), str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    # Dataclasses need their module in sys.modules.
    sys.modules[loader.name] = module
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def play(
    folder: Path, tasks: list[dict[str, Any]], variables: dict[str, Any], **keywords: Any
) -> subprocess.CompletedProcess[str]:
    """Runs tasks on this machine in a play with these keywords."""
    file = folder / "play.yml"
    given = {**variables, "ansible_python_interpreter": sys.executable}
    start = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": given, "tasks": tasks}
    file.write_text(yaml.safe_dump([start | keywords]))
    return subprocess.run(
        ["ansible-playbook", "-i", "localhost,", str(file)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
