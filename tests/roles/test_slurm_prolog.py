"""The prolog creates the folder of a user's containers, and never changes the owner of existing files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cluster import ROOT

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="requires root, to change owners")

NOBODY = 65534


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Returns the folder that the prolog creates."""
    return tmp_path / "oci/nobody"


def prolog(state: Path, uid: int = NOBODY, job: str = "17") -> subprocess.CompletedProcess[str]:
    """Runs the prolog of a job."""
    text = (ROOT / "roles/slurm/templates/prolog.j2").read_text()
    script = state.parents[1] / "prolog"
    text = text.replace("{{ _slurm_marks_dir | quote }}", str(state.parents[1] / "marks"))
    script.write_text(text.replace("{{ _slurm_oci_state_dir | quote }}", str(state.parent)))
    environment = {"SLURM_JOB_UID": str(uid), "SLURM_JOB_ID": job, "SLURM_JOB_USER": "../../etc"}
    return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=False)


def owner_and_mode(path: Path) -> tuple[int, int]:
    about = path.lstat()
    return about.st_uid, about.st_mode & 0o7777


def test_a_user_gets_a_folder_that_only_he_can_write_to(state: Path) -> None:
    done = prolog(state)
    assert done.returncode == 0, done.stderr
    assert owner_and_mode(state) == (NOBODY, 0o700)
    assert owner_and_mode(state.parent) == (0, 0o711)
    assert (state.parents[1] / f"marks/{NOBODY}/17").exists()
    assert owner_and_mode(state.parents[1] / "marks") == (0, 0o700)


def test_a_folder_that_its_user_has_opened_is_closed_again(state: Path) -> None:
    prolog(state)
    state.chmod(0o777)
    assert prolog(state).returncode == 0
    assert owner_and_mode(state) == (NOBODY, 0o700)


@pytest.mark.parametrize("kind", ["link", "file", "another's folder"])
def test_what_is_not_the_users_folder_stops_the_job_and_stays_as_it_is(state: Path, kind: str) -> None:
    state.parent.mkdir()
    target = state.parents[1] / "of-root"
    target.mkdir(mode=0o700)
    match kind:
        case "link":
            state.symlink_to(target)
        case "file":
            state.write_text("")
        case _:
            state.mkdir()
            os.chown(state, 1, 1)
    before = [owner_and_mode(path) for path in (state, target)]
    done = prolog(state)
    assert done.returncode == 1
    assert f"{state} " in done.stderr
    assert [owner_and_mode(path) for path in (state, target)] == before


def test_a_number_without_a_name_gets_no_folder_and_does_not_stop_the_node(state: Path) -> None:
    done = prolog(state, uid=3_999_999)
    assert done.returncode == 0, done.stderr
    assert not state.parent.exists()


@pytest.mark.attack(
    "M7",
    "a job fills the folder of container state with files",
    before="the next user's prolog failed, and SLURM drained the node",
    now="the next job starts without containers, and the node's log gives the reason; the epilog frees the space",
)
def test_a_full_folder_does_not_take_the_node_out_of_service(state: Path) -> None:
    state.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=4", "tmpfs", str(state.parent)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounts are not permitted")
    try:
        for name in (".steps", "mallory", "mallory/1"):
            (state.parent / name).mkdir()
        done = prolog(state)
        assert done.returncode == 0, done.stderr
        assert not state.exists()
        (state.parent / "mallory/1").rmdir()
        assert prolog(state).returncode == 0
        assert owner_and_mode(state) == (NOBODY, 0o700)
    finally:
        subprocess.run(["umount", state.parent], check=True)


@pytest.mark.parametrize(
    "name",
    [
        "templates/prolog.j2",
        "templates/epilog.j2",
        "files/ictx-oci-as-user",
        "files/ictx-oci-clean",
        "files/ictx-mail",
    ],
)
def test_the_path_is_also_that_of_what_is_run(name: str) -> None:
    # SLURM runs prologs and epilogs without PATH, and `timeout` then searches only /bin and /usr/bin.
    lines = (ROOT / "roles/slurm" / name).read_text().splitlines()
    assert "export PATH=/usr/sbin:/usr/bin:/sbin:/bin" in lines


@pytest.mark.parametrize(("queue", "stays"), [("17 COMPLETING", False), ("18 PENDING", True), ("18 RUNNING", True)])
def test_the_folder_stays_for_a_job_that_was_lost_with_the_node_and_comes_back(
    state: Path, queue: str, stays: bool
) -> None:
    """SLURM starts such a job on the same node without another prolog."""
    top = state.parents[1]
    for job in ("17", "18"):
        assert prolog(state, job=job).returncode == 0
    programs = {"squeue": f'case "$*" in *{queue.split()[1]}*) echo {queue.split()[0]};; esac', "scontrol": "true"}
    for name, text in programs.items():
        (top / name).write_text(f"#!/bin/sh\n{text}\n")
        (top / name).chmod(0o755)
    text = (ROOT / "roles/slurm/templates/epilog.j2").read_text().replace("export PATH=", f"export PATH={top}:")
    text = text.replace("{{ _slurm_marks_dir | quote }}", str(top / "marks"))
    text = text.replace("{{ _slurm_oci_state_dir | quote }}", str(state.parent)).replace("/dev/shm /tmp", str(state))
    (top / "epilog").write_text(re.sub(r"(?s)\{% if.*?endif %\}", "", text))
    top.chmod(0o711)
    job = {"SLURM_JOB_UID": str(NOBODY), "SLURM_JOB_ID": "17", "SLURMD_NODENAME": "n1"}
    done = subprocess.run(["sh", top / "epilog"], env=job, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert state.exists() == stays


@pytest.mark.parametrize("booted", [True, False])
def test_slurmd_forgets_which_jobs_had_a_prolog_when_a_boot_removed_what_it_made(tmp_path: Path, booted: bool) -> None:
    text = (ROOT / "roles/slurm/templates/slurmd.service.conf.j2").read_text()
    (command,) = re.findall(r"^ExecStartPre=(/bin/sh -c '.*')$", text, re.MULTILINE)
    command = command.replace("{{ _slurm_marks_dir }}", str(tmp_path / "marks"))
    for name in ("cred_state", "cred_state.old"):
        (tmp_path / name).touch()
    if not booted:
        (tmp_path / "marks").mkdir()
    subprocess.run(shlex.split(command.replace("/var/spool/slurmd", str(tmp_path))), check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        [] if booted else ["cred_state", "cred_state.old", "marks"]
    )


@pytest.fixture
def left() -> Iterator[Path]:
    """Yields the folder of oci.conf: steps 17.0 and 18.0 were killed, 17.1 runs. Its user can enter it."""
    with TemporaryDirectory() as place:
        yield fill(Path(place))


def fill(top: Path) -> Path:
    folder, state = top / ".steps", top / "nobody"
    folder.mkdir()
    for step in ("17.0", "17.1", "18.0"):
        container = state / f"n1.nobody.{step}.0"
        container.mkdir(parents=True)
        (container / "state.json").touch()
        (folder / step).mkdir()
        (folder / step / "config.json").touch()
    subprocess.run(["chown", "--recursive", str(NOBODY), state, *folder.iterdir()], check=True)
    for path in (top, folder):
        path.chmod(0o711)
    return top


@pytest.fixture
def slurmstepd() -> Iterator[None]:
    """A process with the name of the slurmstepd of step 17.1."""
    with subprocess.Popen(["slurmstepd: [17.1]", "60"], executable="/bin/sleep") as process:
        yield
        process.kill()


def clean(top: Path, *job: str) -> list[str]:
    """Runs ictx-oci-clean; returns the steps whose folders remain, which are also those whose state remains."""
    subprocess.run(["sh", ROOT / "roles/slurm/files/ictx-oci-clean", top, *job], check=True)
    steps = sorted(path.name for path in (top / ".steps").iterdir())
    assert sorted(path.name for path in (top / "nobody").iterdir()) == [f"n1.nobody.{step}.0" for step in steps]
    return steps


@pytest.mark.usefixtures("slurmstepd")
def test_a_step_that_was_killed_leaves_nothing_that_its_number_fails_at(left: Path) -> None:
    assert clean(left, "17") == ["17.1", "18.0"]
    assert clean(left) == ["17.1"]


def test_a_link_among_what_a_step_left_leads_root_nowhere(left: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    (left / ".steps/17.0/link").symlink_to(tmp_path)
    (left / "nobody/n1.nobody.17.0.9").symlink_to(tmp_path)
    (left / ".steps/19.0").symlink_to(tmp_path)
    subprocess.run(["sh", ROOT / "roles/slurm/files/ictx-oci-clean", left], check=True)
    assert kept.exists()
    assert [path.name for path in (left / ".steps").iterdir()] == ["19.0"]
    assert not list((left / "nobody").iterdir())
