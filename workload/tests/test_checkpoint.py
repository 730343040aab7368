"""Checkpoints load on any number of ranks; a damaged one is reported, and the previous one is used."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save as save_without_manifest

from ictx import manifest
from ictx.errors import UserError
from ictx.manifest import MANIFEST_FILE, Entry, Unusable
from ictx.train.checkpoint import Checkpoints, load_model

DATA, INDEX = "__0_0.distcp", ".metadata"


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(value: float) -> dict[str, Any]:
    return {"model": {"weight": torch.full((300, 40), float(value))}, "losses": {"loss": value}, "data": "abc"}


def value_of(loaded: dict[str, Any]) -> float:
    """Returns the value with which the state was created."""
    weight = loaded["model"]["weight"]
    assert torch.equal(weight, torch.full((300, 40), loaded["losses"]["loss"]))
    return float(loaded["losses"]["loss"])


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    """Checkpoints of a run at steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    return checkpoints


def test_the_newest_checkpoint_comes_back(run: Checkpoints) -> None:
    loaded = state(0)
    assert (run.load_newest(loaded), value_of(loaded)) == (2, 2)
    assert manifest.verify(run.directory / "step-00000002").keys() == {DATA, INDEX}
    run.save(3, state(3))
    assert [path.name for path in run.complete()] == ["step-00000002", "step-00000003"]


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def listed(directory: Path, entries: dict[str, Entry]) -> None:
    (directory / MANIFEST_FILE).unlink()
    manifest.write(directory, entries)


def as_listed(directory: Path) -> None:
    """Updates the manifest, as only the folder's owner can."""
    listed(directory, manifest.hash_files(directory, manifest.list_files(directory)))


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: os.truncate(d / DATA, 1000), rf"{DATA}: has 1,000 bytes instead of"),
    (lambda d: os.truncate(d / DATA, 0), rf"{DATA}: has 0 bytes instead of"),
    (lambda d: flip(d / DATA), rf"{DATA}: its SHA-256 is"),
    (lambda d: flip(d / INDEX), rf"{INDEX}: its SHA-256 is"),
    (lambda d: (d / INDEX).unlink(), rf"{INDEX}: is missing"),
    (lambda d: (d / DATA).unlink(), rf"{DATA}: is missing"),
    (lambda d: (d / MANIFEST_FILE).unlink(), rf"{MANIFEST_FILE}: is missing"),
    (lambda d: [path.unlink() for path in d.iterdir()], rf"{MANIFEST_FILE}: No such file"),
    (lambda d: (d / "more").touch(), r"more: is not in the manifest"),
    (lambda d: replaced(d / DATA, lambda path: path.symlink_to("/dev/zero")), rf"{DATA}: is a symbolic link"),
    (lambda d: replaced(d / INDEX, os.mkfifo), rf"{INDEX}: is a symbolic link or a special file"),
    (lambda d: listed(d, {"../../x": Entry("0" * 64, 1)}), "'../../x' is not the name of a file"),
    (lambda d: (d / MANIFEST_FILE).write_bytes(b"[" * 100_000), f"{MANIFEST_FILE}: is not JSON"),
    (lambda d: (d / MANIFEST_FILE).write_bytes(b"\xff\x00"), f"{MANIFEST_FILE}: is not JSON"),
    (lambda d: os.truncate(d / MANIFEST_FILE, 1 << 40), f"{MANIFEST_FILE}: has more than 16 MiB"),
    (lambda d: (d / DATA).chmod(0o664), f"{DATA}: others can write to it .mode 0664"),
    (lambda d: d.chmod(0o777), "step-00000002: others can write to it .mode 0777"),
    (lambda d: (shutil.rmtree(d), d.symlink_to(d.with_name("step-00000001"))), "step-00000002: is a symbolic link"),
    (lambda d: (shutil.rmtree(d), d.touch()), "step-00000002/: Not a directory"),
]


@pytest.mark.attack(
    "H7",
    "the newest checkpoint is damaged: files cut, a bit flipped, files missing, added or replaced by links",
    before="read as 8.8e-38 instead of 30.0, or failed without trying the previous checkpoint",
    now="file and damage are logged, and the run resumes from the newest intact checkpoint",
)
@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    run: Checkpoints, damage: Callable[[Path], object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.directory / "step-00000002"
    damage(newest)
    loaded = state(0)
    assert (run.load_newest(loaded), value_of(loaded)) == (1, 1)
    out = capsys.readouterr().out
    assert out.startswith("checkpoint step-00000002 is not used: ")
    assert out.count("\n") == 1
    assert re.search(reason, out), out
    assert [path.name for path in run.complete()] == ["step-00000001"]
    assert os.path.lexists(f"{newest}.unusable"), "the damaged checkpoint is kept under another name"
    run.save(2, state(2))
    assert (run.load_newest(loaded), value_of(loaded)) == (2, 2)


@given(place=st.floats(0, 1, exclude_max=True), name=st.sampled_from([DATA, INDEX]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_found(run: Checkpoints, name: str, place: float) -> None:
    newest = run.directory / "step-00000002"
    flip(newest / name, place)
    with pytest.raises(Unusable, match=f"{name}: its SHA-256"):
        manifest.verify(newest)
    flip(newest / name, place)
    manifest.verify(newest)


def test_without_any_that_can_be_used_the_run_does_not_start_anew(run: Checkpoints) -> None:
    for path in run.complete():
        (path / INDEX).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .*step-00000001, step-00000002.*restore"):
        run.load_newest(state(0))
    assert len([*run.directory.glob("step-????????")]) == 2, "nothing was renamed"


@pytest.mark.attack(
    "C3",
    "a checkpoint index (a pickle) that runs a command, in the folder that the next start reads",
    before="the command ran as the user of the job",
    now="not read: files must belong to the user and match a manifest, and only plain data is unpickled",
)
@pytest.mark.parametrize("known", [False, True], ids=["planted", "with a right manifest"])
def test_a_pickle_that_runs_something_is_not_read(run: Checkpoints, known: bool, tmp_path: Path) -> None:
    newest = run.directory / "step-99999999"
    shutil.copytree(run.directory / "step-00000002", newest)
    (newest / INDEX).write_bytes(pickle.dumps(Hostile(tmp_path / "pwned")))
    if known:
        as_listed(newest)
    loaded = state(0)
    assert (run.load_newest(loaded), value_of(loaded)) == (2, 2)
    assert not (tmp_path / "pwned").exists()


class Attribute:
    """Is pickled as `getattr(…)`."""

    def __init__(self, *words: object) -> None:
        self.words = words

    def __reduce__(self) -> Any:
        return getattr, self.words


def test_an_index_of_debian_12s_python_is_read_and_no_other_attribute_is(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(self: Enum, protocol: int) -> Any:
        return getattr, (self.__class__, self.name)

    with monkeypatch.context() as patched:
        patched.setattr(Enum, "__reduce_ex__", older)
        run.save(3, state(3))
    assert b"getattr" in (run.directory / "step-00000003" / INDEX).read_bytes()
    loaded = state(0)
    assert (run.load_newest(loaded), value_of(loaded)) == (3, 3)
    for step, words in enumerate([(torch.Size, "mro"), (torch.float32, "__reduce__")], 4):
        newest = run.directory / f"step-{step:08}"
        shutil.copytree(run.directory / "step-00000003", newest)
        (newest / INDEX).write_bytes(pickle.dumps(Attribute(*words)))
        as_listed(newest)
        assert run.load_newest(state(0)) == 3


def test_values_that_run_something_are_not_read(run: Checkpoints, tmp_path: Path) -> None:
    run.save(3, {**state(3), "data": Hostile(tmp_path / "pwned")})
    loaded = state(0)
    assert run.load_newest(loaded) == 2
    assert not (tmp_path / "pwned").exists()


def test_an_index_refers_to_listed_files_only(run: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run.directory / "step-00000002"
    index = (newest / INDEX).read_bytes()
    assert DATA.encode() in index
    (newest / INDEX).write_bytes(index.replace(DATA.encode(), b"/etc/shadow0"))
    as_listed(newest)
    assert run.load_newest(state(0)) == 1
    assert f"{INDEX}: refers to '/etc/shadow0', which is not in the manifest" in capsys.readouterr().out


@pytest.mark.attack(
    "C3",
    "a later checkpoint with a correct manifest that another user owns",
    before="loaded",
    now="reported with the owner's ID, and not read",
)
@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to change owners")
@pytest.mark.parametrize("name", [".", DATA, INDEX, MANIFEST_FILE])
def test_what_belongs_to_another_user_is_not_read(
    run: Checkpoints, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chown(run.directory / "step-00000002" / name, 2003, -1)
    assert run.load_newest(state(0)) == 1
    assert "belongs to user id 2003, not to 0" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to change owners")
def test_the_folder_of_a_run_must_be_the_users_own(run: Checkpoints) -> None:
    os.chown(run.directory.parent, 2003, -1)
    with pytest.raises(UserError, match=f"{run.directory.parent}: belongs to user id 2003"):
        run.load_newest(state(0))


def test_write_access_to_a_runs_folders_is_taken_from_others(
    run: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    run.directory.parent.chmod(0o2775)
    assert run.load_newest(state(0)) == 2
    assert run.directory.parent.stat().st_mode & 0o7777 == 0o2755
    assert f"{run.directory.parent}: removing write access of others (mode was 2775)" in capsys.readouterr().out


def test_checkpoints_are_writable_by_their_owner_only_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        path = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).save(1, state(1))
    finally:
        os.umask(before)
    assert not [file for file in [path, path.parent, *path.iterdir()] if file.stat().st_mode & 0o022]


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step in (1, 2, 3):
        save_without_manifest(state(step), checkpoint_id=checkpoints.directory / f"step-{step:08}")
    os.truncate(checkpoints.directory / "step-00000003" / DATA, 0)
    loaded = state(0)
    assert (checkpoints.load_newest(loaded), value_of(loaded)) == (2, 2)
    assert "checkpoint step-00000003 is not used" in capsys.readouterr().out
    (checkpoints.directory / "step-00000002" / DATA).chmod(0o666)
    assert checkpoints.load_newest(loaded) == 1


def test_what_is_not_finite_is_neither_written_nor_read(run: Checkpoints) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        poisoned = state(3)
        poisoned["model"]["weight"][7, 7] = bad
        with pytest.raises(UserError, match=r"step-00000003 was not written, because weights .* are not finite"):
            run.save(3, poisoned)
    assert [path.name for path in run.directory.iterdir() if "3" in path.name] == []
    save_without_manifest(poisoned, checkpoint_id=run.directory / "step-00000003")
    assert run.load_newest(state(0)) == 2


def test_another_shape_is_a_wrong_setting_and_no_damage(run: Checkpoints) -> None:
    other = state(0)
    other["model"]["weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError, match=r"step-00000002 does not match this configuration .*ize mismatch"):
        run.load_newest(other)
    assert len(run.complete()) == 2


def test_a_model_is_read_of_a_verified_checkpoint_only(run: Checkpoints) -> None:
    path = run.directory / "step-00000002"
    flip(path / DATA)
    with pytest.raises(UserError, match=f"{DATA}: its SHA-256"):
        load_model(path)
    path.chmod(0o777)
    with pytest.raises(UserError, match="others can write to it"):
        load_model(path)


RANKS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from ictx.errors import UserError
from ictx.train.checkpoint import Checkpoints

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=9)

def state(value):
    weight = distribute_tensor(torch.full((300, 40), float(value)), mesh, [Shard(0)])
    return {"model": {"weight": weight}, "losses": {"loss": value}, "data": "abc"}

def load():
    loaded = state(0)
    step = checkpoints.load_newest(loaded)
    assert torch.equal(loaded["model"]["weight"].full_tensor(), torch.full((300, 40), float(step)))
    print("loaded", step)

load()
for step in (3, 4):
    checkpoints.save(step, state(step))
load()
if rank == 0:
    file = checkpoints.directory / "step-00000004" / "__1_0.distcp"
    file.write_bytes(file.read_bytes().replace(bytes([0, 0, 128, 64]), bytes([1, 0, 128, 64]), 1))
load()
poisoned = state(5)
if rank == 1:
    poisoned["model"]["weight"].to_local()[0] = float("nan")
try:
    checkpoints.save(5, poisoned)
except UserError as error:
    print(error)
dist.destroy_process_group()
"""


def test_two_ranks_read_what_one_wrote_agree_and_write_what_one_reads(run: Checkpoints, tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", RANKS, tmp_path, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=600)[0] for process in started)
    lines = [line for line in first.splitlines() if not line.startswith("checkpoint step-00000004 is not used")]
    assert lines == second.splitlines()
    assert lines[:3] == ["loaded 2", "loaded 4", "loaded 3"]
    assert "step-00000005 was not written, because" in lines[3]
    # Only the second rank reads the damaged file, but both load the older checkpoint.
    assert "checkpoint step-00000004 is not used: " in first
    assert "__1_0.distcp: its SHA-256 is" in first
    files = json.loads((run.directory / "step-00000003" / MANIFEST_FILE).read_text())["files"]
    assert set(files) == {DATA, "__1_0.distcp", INDEX}
    loaded = state(0)
    assert (run.load_newest(loaded), value_of(loaded)) == (3, 3)
