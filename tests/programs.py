"""Programs that the platform runs: those of this machine, else those in the distribution's packages, unpacked."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

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
