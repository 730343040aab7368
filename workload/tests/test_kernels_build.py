"""Kernels that are compiled ahead of time pass the gate, and a process on such a GPU compiles no others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ictx.errors import UserError
from ictx.infer.launches import drive
from ictx.kernels import dispatch
from ictx.kernels.build import shipped
from ictx.kernels.build.build import TARGETS, build
from ictx.kernels.build.offline import launches, names
from ictx.kernels.build.shipped import MANIFEST, default_cache, fingerprint, state
from ictx.kernels.build.triton_cache import ShippedCache, _usable

MANAGER = f"{ShippedCache.__module__}:{ShippedCache.__name__}"


def launched(function: str, target: int, shipped: Path, own: Path) -> tuple[dict[str, list[str]], str]:
    """Runs a function of `launched.py` in a process; returns the compiled and found kernels, and the output."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("launched.py"), function, str(target)],
        env=environment
        | {"TRITON_CACHE_MANAGER": MANAGER, "ICTX_KERNEL_CACHE": str(shipped), "TRITON_CACHE_DIR": str(own)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, list[str]] = json.loads(ended.stdout.splitlines()[-1])
    return found, ended.stderr


def files(folder: Path) -> Mapping[Path, int]:
    """Returns the modification time of each file below a folder, in ns."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built() -> Path:
    """Builds every variant for every target into the user's cache, which keeps unchanged ones between runs."""
    if dispatch.interpreted():
        pytest.skip("nothing is compiled in Triton's interpreter")
    cache = default_cache()
    ended = subprocess.run(
        [sys.executable, "-m", "ictx", "kernels", "build", "--cache", cache],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    reports = json.loads((cache / MANIFEST).read_text("utf-8"))["reports"]
    assert len(reports) == ended.stdout.count("\nsm_")
    return cache


@pytest.mark.full
def test_every_variant_for_every_target_is_fit_to_ship(built: Path) -> None:
    """Register spills, too much shared memory or missing tensor core instructions fail the fixture's build."""
    reports = json.loads((built / MANIFEST).read_text("utf-8"))["reports"].values()
    assert {report["target"] for report in reports} == set(TARGETS)
    assert all(report["spilled"] == 0 and report["cubin"] > 0 for report in reports)
    for target in TARGETS:
        kernels = {report["name"].split("/")[0] for report in reports if report["target"] == target}
        step = {"next_token.begin", "products.project", "products.absorb", "rope_cache.rope_cache", "decode.decode"}
        assert step | {"next_token.best_of_part", "next_token.best_of_all"} <= kernels
        assert {"attention.forward", "attention_backward.keys_values", "attention_backward.queries"} <= kernels
        assert any(r["tensor_cores"] for r in reports if r["target"] == target)


@pytest.mark.parametrize(("function", "target"), [("served", 75), ("served", 80), ("served", 90), ("trained", 90)])
@pytest.mark.full
def test_a_process_with_the_shipped_folder_compiles_nothing(
    built: Path, function: str, target: int, tmp_path: Path
) -> None:
    before = files(built)
    found, _ = launched(function, target, built, tmp_path)
    assert found["compiled"] == []
    assert set(found["found"]) >= ({"decode", "project", "begin"} if function == "served" else {"forward", "queries"})
    assert files(built) == before and not files(tmp_path)


@pytest.mark.full
def test_a_stale_folder_is_not_used(built: Path, tmp_path: Path) -> None:
    """A folder that has moved is used."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for metadata in built.glob("*/best_of_*.json"):
        if json.loads(metadata.read_text())["target"]["arch"] == 80:
            (moved / metadata.parent.name).mkdir()
            for path in metadata.parent.iterdir():
                os.link(path, moved / path.parent.name / path.name) if path.is_file() else None
    manifest = json.loads((built / MANIFEST).read_text("utf-8"))
    (moved / MANIFEST).write_text(json.dumps(manifest))
    found, said = launched("likeliest", 80, moved, tmp_path / "first")
    assert found == {"compiled": [], "found": ["best_of_part", "best_of_all"]} and "not used" not in said
    manifest["fingerprint"]["sources"] = "0" + manifest["fingerprint"]["sources"][1:] + "0"
    (moved / MANIFEST).write_text(json.dumps(manifest))
    found, said = launched("likeliest", 80, moved, tmp_path / "second")
    assert found == {"compiled": ["best_of_part", "best_of_all"], "found": []}
    assert f"ICTX_KERNEL_CACHE={moved} is not used, kernels are compiled: it is stale: sources changed" in said
    # It finds its compiled kernels in the next process.
    found, _ = launched("likeliest", 80, tmp_path / "none", tmp_path / "second")
    assert found["compiled"] == []


@pytest.mark.full
def test_files_of_a_folder_that_moved_are_read_where_they_are(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = next(built.glob("*/decode.json")).parent.name
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / MANIFEST).write_text((built / MANIFEST).read_text("utf-8"), "utf-8")
    (moved / key).mkdir()
    for path in (built / key).glob("*decode*"):
        os.link(path, moved / key / path.name)
    monkeypatch.setenv("ICTX_KERNEL_CACHE", str(moved))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    _usable.cache_clear()
    group = ShippedCache(key).get_group("decode.json")
    assert group and {Path(path).parent for path in group.values()} == {moved / key}
    # A kernel with a missing file is compiled.
    (moved / key / "decode.cubin").unlink()
    assert ShippedCache(key).get_group("decode.json") is None
    _usable.cache_clear()


def test_every_source_below_the_rooms_that_launch_is_in_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(shipped.__file__).parents[2]
    for room in ("kernels", "model", "infer"):
        shutil.copytree(package / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "kernels/build/shipped.py"))
    before = fingerprint()
    (tmp_path / "infer" / "__pycache__").mkdir()
    (tmp_path / "infer/__pycache__/cache.cpython-311.pyc").touch()
    assert fingerprint() == before
    for file in ("kernels/attention/triton.py", "kernels/tuned.json", "model/rope.py", "infer/decode_step.py"):
        (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
        before, last = fingerprint(), before
        assert before["sources"] != last["sources"], file


def test_a_stale_or_foreign_cache_is_never_trusted(tmp_path: Path) -> None:
    def nothing(target: int) -> None:
        raise AssertionError

    assert state(tmp_path) == "missing"
    for content in ("{", "[]", '{"fingerprint": 1, "reports": {}}', json.dumps({"fingerprint": fingerprint()})):
        (tmp_path / MANIFEST).write_text(content)
        assert state(tmp_path) == "unreadable"
    (tmp_path / MANIFEST).write_text(json.dumps({"fingerprint": fingerprint(), "reports": {}}))
    assert state(tmp_path) == "fresh"
    foreign = fingerprint() | {"triton": "0.0"}
    (tmp_path / MANIFEST).write_text(json.dumps({"fingerprint": foreign, "reports": {"sm_80/x": {}}}))
    (tmp_path / "left").write_text("")
    assert state(tmp_path) == "stale: triton changed"
    assert build(tmp_path, (), nothing) == []
    assert state(tmp_path) == "fresh"
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="not empty"):
        build(tmp_path, (), nothing)


def test_each_variant_has_a_name_of_its_own() -> None:
    found = launches(lambda: drive(90), 90)
    assert len(set(names(found).values())) == len(found) == len({launch.digest for launch in found})


def test_another_checkout_finds_what_was_built() -> None:
    """The key of a launch depends on the compiled source, not on Triton's location."""
    launch, *_ = launches(lambda: drive(75), 75)
    content = json.loads(launch.specialisation)
    libraries = content["options"]["extern_libs"]
    content["options"]["extern_libs"] = [[name, f"/elsewhere{path}"] for name, path in libraries]
    assert libraries
    assert replace(launch, specialisation=json.dumps(content)).digest == launch.digest
    content["options"]["num_warps"] += 1
    assert replace(launch, specialisation=json.dumps(content)).digest != launch.digest


@pytest.mark.gpu
def test_this_gpu_finds_all_that_generation_asks_for(tmp_path: Path) -> None:
    target = dispatch.capability(torch.device("cuda"))
    if target not in TARGETS:
        pytest.skip(f"nothing is built for compute capability {target}")
    reports: list[Any] = build(tmp_path / "shipped", (target,), drive, os.cpu_count() or 2)
    # Only the gate checks faults, with the compiler of the lock files; other compilers may spill.
    assert reports
    found, _ = launched("generated", target, tmp_path / "shipped", tmp_path / "own")
    assert found["compiled"] == []
    assert {"decode", "project", "begin", "best_of_all", "rope_cache", "absorb"} <= set(found["found"])
