"""The mapping of GPUs to jobs that dcgm-exporter reads: one file per GPU, one job per line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT
from programs import loaded

PROGRAM = ROOT / "roles/dcgm_exporter/files/ictx-gpu-jobs"
JOBS = loaded(PROGRAM)


@pytest.fixture(autouse=True)
def _driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lays out a driver whose device files are not numbered in the order of the PCI bus."""
    for address, minor in (("0000:07:00.0", 1), ("0000:47:00.0", 0)):
        (tmp_path / "driver" / address).mkdir(parents=True)
        (tmp_path / "driver" / address / "information").write_text(f"Model: \t A100\nDevice Minor: \t {minor}\n")
    monkeypatch.setattr(JOBS, "DRIVER", tmp_path / "driver")


def files(folder: Path) -> dict[str, list[str]]:
    return {file.name: file.read_text().split() for file in folder.iterdir()}


def test_a_job_has_its_gpus_from_prolog_to_epilog(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    JOBS.change("add", folder, "17", "0,1")
    assert files(folder) == {"0": ["17"], "1": ["17"]}
    JOBS.change("remove", folder, "17", "")
    assert files(folder) == {}


def test_gpus_are_numbered_as_the_bus_has_them(tmp_path: Path) -> None:
    JOBS.change("add", tmp_path / "jobs", "17", "1")
    assert files(tmp_path / "jobs") == {"0": ["17"]}


def test_a_shared_gpu_has_both_jobs_until_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    for job in ("17", "18", "17"):
        JOBS.change("add", folder, job, "0")
    assert files(folder) == {"1": ["18", "17"]}
    JOBS.change("remove", folder, "18", "0")
    assert files(folder) == {"1": ["17"]}


def test_a_job_without_gpus_is_nowhere(tmp_path: Path) -> None:
    JOBS.change("add", tmp_path / "jobs", "17", "")
    assert files(tmp_path / "jobs") == {}


def test_a_job_that_comes_back_leaves_the_gpus_that_it_had_before(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    JOBS.change("add", folder, "17", "0")
    JOBS.change("add", folder, "17", "1")
    assert files(folder) == {"0": ["17"]}


def test_a_folder_that_cannot_be_written_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("")
    command = [sys.executable, str(PROGRAM), "add", str(tmp_path / "jobs")]
    done = subprocess.run(command, env={"SLURM_JOB_ID": "17", "SLURM_JOB_GPUS": "0"}, capture_output=True, check=False)
    assert done.returncode == 0
