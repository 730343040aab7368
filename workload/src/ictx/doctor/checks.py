"""The checks of `ictx doctor`: each yields findings, with a remedy for each problem."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from ictx.errors import UserError
from ictx.version import installed

LEAST_GB = 20
"""Free space (GB) for a checkpoint of the 1B model with its optimizer state (12 GB) beside the previous one."""
LEAST_CAPABILITY = (7, 5)
"""Minimum compute capability of the pinned PyTorch and our kernels."""


class Level(Enum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Works, but with fewer features or less performance."""
    FAIL = "FAIL"
    """Training or serving would fail."""


class Finding(NamedTuple):
    """Result of a check; the remedy is empty if there is no problem."""

    level: Level
    text: str
    remedy: str = ""


def python() -> Iterator[Finding]:
    """Version and path of Python."""
    yield Finding(Level.OK, f"Python {sys.version.split()[0]}, {sys.executable}")


def packages() -> Iterator[Finding]:
    """Packages that training requires, and optional ones."""
    for name in ("torch", "triton", "transformers", "mlflow-skinny"):
        yield from _package(name, Level.FAIL if name in ("torch", "mlflow-skinny") else Level.NOTE)
    found = [
        f"{name} {version}"
        for name in ("trl", "peft", "wandb", "torchao", "vllm", "flash-attn-4")
        if (version := installed(name))
    ]
    yield Finding(Level.OK, f"optional: {', '.join(found) or 'none'}")


def _package(name: str, level: Level) -> Iterator[Finding]:
    version = installed(name)
    if version:
        yield Finding(Level.OK, f"{name} {version}")
    else:
        yield Finding(
            level,
            f"{name} is not installed",
            "run scripts/bootstrap workload, or install a lock of workload/requirements",
        )


def gpus() -> Iterator[Finding]:
    """GPUs that PyTorch can use."""
    if not installed("torch"):
        return
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            remedy = "this is a CPU build: install workload/requirements/cuda.txt, or set image_bake_accelerator: cuda"
            yield Finding(Level.FAIL, f"{driver} exists, but PyTorch {torch.__version__} has no GPU support", remedy)
        elif driver:
            remedy = "compare `nvidia-smi` with the CUDA version; in a job request GPUs (--gpus-per-node)"
            yield Finding(Level.FAIL, f"{driver} exists, but PyTorch finds no GPU", remedy)
        else:
            yield Finding(Level.NOTE, "no NVIDIA GPU: everything runs on the CPU in PyTorch")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"compute capability {about.major}.{about.minor}"
        text = f"GPU {number}: {about.name}, {capability}, {about.total_memory / 1e9:.0f} GB"
        if (about.major, about.minor) < LEAST_CAPABILITY:
            yield Finding(Level.FAIL, text, "use a GPU of compute capability 7.5 (Turing) or newer")
        else:
            yield Finding(Level.OK, text)
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        remedy = "install gcc and Python's headers: Triton and torch.compile need them to build launchers"
        yield Finding(Level.NOTE, "no C compiler", remedy)


def kernels() -> Iterator[Finding]:
    """The implementation that each operation uses, and precompiled kernels."""
    if not installed("torch"):
        return
    import torch

    from ictx.kernels.dispatch import explain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {
        f"{operation} {choice.name}"
        for operation, stored, choice in explain(device, torch.bfloat16, None)
        if stored in ("16-bit", "equal")
    }
    yield Finding(Level.OK, f"{', '.join(sorted(chosen))} (reasons: ictx kernels explain)")
    cache = os.environ.get("ICTX_KERNEL_CACHE", "")
    if device.type == "cuda" and not (cache and Path(cache).is_dir()):
        remedy = "run ictx kernels build, or set image_bake_kernel_targets; otherwise the first step compiles them"
        yield Finding(Level.NOTE, "no precompiled kernels (ICTX_KERNEL_CACHE)", remedy)


def tracking() -> Iterator[Finding]:
    """Whether MLflow responds, and the mode of W&B."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        remedy = "set MLFLOW_TRACKING_URI (set in jobs); otherwise runs are logged only to their folders"
        yield Finding(Level.NOTE, "MLflow: not configured", remedy)
    elif installed("mlflow-skinny") or installed("mlflow"):
        from ictx.registry import explained, new_client

        try:
            with explained():
                new_client().search_experiments(max_results=1)
            yield Finding(Level.OK, f"MLflow responds at {uri}")
        except UserError as error:
            yield Finding(Level.FAIL, str(error), "see docs/runbooks/MlflowDown.md; runs publish queued data later")
    if installed("wandb"):
        from ictx.track.config import DEFAULTS
        from ictx.track.wandb import mode

        yield Finding(Level.OK, f"W&B: {mode(DEFAULTS)}")


def storage(folder: Path) -> Iterator[Finding]:
    """Whether a folder for runs is writable, and its free space."""
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield Finding(
            Level.FAIL,
            f"{folder} is not a folder that {os.environ.get('USER', 'this user')} can write to",
            "set --dir to another folder",
        )
        return
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{folder}: {free:,.0f} GB free"
    if free < LEAST_GB:
        yield Finding(
            Level.NOTE, text, f"keep {LEAST_GB} GB free: a checkpoint of ictx-1b with its optimizer needs 12 GB"
        )
    else:
        yield Finding(Level.OK, text)


def job() -> Iterator[Finding]:
    """The SLURM job, if this runs in one."""
    number = os.environ.get("SLURM_JOB_ID")
    if number:
        image = os.environ.get("ICTX_IMAGE_DIGEST", "none (not in the baked image)")
        yield Finding(Level.OK, f"job {number} on {os.environ.get('SLURM_JOB_NODELIST', '?')}, image {image}")


def checks(folder: Path) -> dict[str, Callable[[], Iterator[Finding]]]:
    """Returns all checks by name; `folder` is where runs would be written."""
    return {
        "python": python,
        "packages": packages,
        "gpus": gpus,
        "kernels": kernels,
        "tracking": tracking,
        "storage": lambda: storage(folder),
        "job": job,
    }
