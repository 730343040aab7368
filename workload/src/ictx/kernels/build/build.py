"""Ahead-of-time compilation of every kernel that the model launches on each target, without a GPU.

The launches are recorded by running the model's code (see `offline`), so that the cache holds the kernels that a
process on such a GPU requests. A manifest records the sources, the versions and the resources of each variant.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.kernels.build.offline import Launch, compiling, launches, names
from ictx.kernels.build.resources import SHARED_LIMIT, Report, inspect
from ictx.kernels.build.shipped import KEPT, MANIFEST, fingerprint, state

TARGETS = tuple(SHARED_LIMIT)
Drive = Callable[[int], None]
"""Runs, on meta tensors, all operations that launch kernels on a GPU of a compute capability."""


def build(cache: Path, targets: tuple[int, ...], drive: Drive, jobs: int = 2) -> list[Report]:
    """Compiles the missing variants, or all if the cache is stale; returns a report per variant.

    Raises UserError if TRITON_INTERPRET is set, or if the folder is not empty and has no manifest.
    """
    if dispatch.interpreted():
        raise UserError("TRITON_INTERPRET is set, so that Triton compiles no kernels: unset it")
    now = state(cache)
    if cache.exists() and now != "fresh":
        # Clear only folders with our manifest: the path may be mistyped.
        if now == "missing" and any(cache.iterdir()):
            raise UserError(f"{cache} is not empty and has no {MANIFEST}: name an empty folder")
        shutil.rmtree(cache)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / MANIFEST
    manifest: dict[str, Any] = {"fingerprint": fingerprint(), "reports": {}}
    if path.exists():
        manifest = json.loads(path.read_text("utf-8"))
    else:
        path.write_text(json.dumps(manifest), "utf-8")
    wanted: dict[Launch, str] = {}
    for target in targets:
        wanted |= names(launches(lambda target=target: drive(target), target))  # type: ignore[misc]
    missing = [launch for launch in wanted if _key(launch) not in manifest["reports"]]
    # Processes, because the compiler holds the GIL; spawned, because torch's threads do not survive a fork.
    with ProcessPoolExecutor(min(jobs, len(missing)) or 1, multiprocessing.get_context("spawn")) as pool:
        labels = [wanted[launch] for launch in missing]
        reports = pool.map(build_one, [cache] * len(missing), missing, labels)
        for launch, report in zip(missing, reports, strict=True):
            manifest["reports"][_key(launch)] = asdict(report)
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
            draft.replace(path)
    entries = ((manifest["reports"][_key(launch)], name) for launch, name in wanted.items())
    return [Report(**{**entry, "name": name, "faults": tuple(entry["faults"])}) for entry, name in entries]


def _key(launch: Launch) -> str:
    """Returns a variant's key in the manifest."""
    return f"sm_{launch.target}/{launch.kernel}/{launch.digest}"


def build_one(cache: Path, launch: Launch, name: str = "") -> Report:
    """Compiles and inspects one variant; deletes the files that a launch does not need."""
    with compiling(cache, launch.target):
        compiled = launch.compile()
    report = inspect(launch, name or launch.kernel, compiled)
    for path in map(Path, compiled.metadata_group.values()):
        if path.suffix not in KEPT:
            path.unlink(missing_ok=True)
    return report


def fit(cache: Path, target: int, run: Callable[[], object], kernels: tuple[str, ...] = ()) -> bool:
    """Whether all kernels that `run` launches on a target, or only `kernels`, pass the release checks."""
    found = [launch for launch in launches(run, target) if not kernels or launch.kernel in kernels]
    return bool(found) and not any(build_one(cache, launch).faults for launch in found)
