"""Checks whether a folder of kernels compiled ahead of time matches this process."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ictx import settings

VARIABLE = "ICTX_KERNEL_CACHE"
"""Environment variable that names the folder."""
MANIFEST = "ictx-kernels.json"
KEPT = (".cubin", ".json")
"""Suffixes of the files that a launch needs; the compiler's intermediate files are not shipped."""


def default_cache() -> Path:
    """Returns the folder in ICTX_KERNEL_CACHE, or by default one in the user's cache."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "ictx", "kernels")


def fingerprint() -> dict[str, str]:
    """Returns the inputs of a cache: hashes of our sources and shipped configurations, and the compiler's versions."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    # Whole folders of code that launches or configures kernels: a list of files would become incomplete.
    found = (path for name in ("kernels", "model", "infer") for path in (package / name).rglob("*.*"))
    for path in sorted(path for path in found if path.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    for path in settings.shipped("model/*.yaml"):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    assembler = hashlib.sha256("".join(str(get_ptxas_version(target)) for target in (90, 100)).encode())
    return {
        "sources": digest.hexdigest(),
        "triton": triton.__version__,
        "assembler": assembler.hexdigest()[:16],
    }


def state(cache: Path) -> str:
    """Returns "fresh", or why the cache must not be used."""
    try:
        manifest = json.loads((cache / MANIFEST).read_text("utf-8"))
        kept, _ = dict(manifest["fingerprint"]), dict(manifest["reports"])
    except FileNotFoundError:
        return "missing"
    except (ValueError, KeyError, TypeError):
        return "unreadable"
    now = fingerprint()
    changed = [key for key in now if kept.get(key) != now[key]]
    return f"stale: {', '.join(changed)} changed" if changed else "fresh"
