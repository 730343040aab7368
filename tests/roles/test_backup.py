"""The backup program with the distribution's restic: folders, databases, and failures.

MariaDB's two programs are stubs: a database is a file, and its dump ends as a real one does. molecule/default saves
and restores a real database.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from programs import loaded
from programs import program as distributed

PROGRAM = ROOT / "roles/backup/files/ictx-backup"
DUMP = """#!/bin/sh
[ ! -e "$DATABASE.down" ] || { echo 'cannot connect' >&2; exit 2; }
cat "$DATABASE"
[ -e "$DATABASE.cut" ] || echo '-- Dump completed on 2026-01-01'
"""
CLIENT = """#!/bin/sh
case "$*" in
*'show databases'*) [ ! -e "$DATABASE" ] || echo accounts ;;
*) [ ! -e "$DATABASE.full" ] || exit 1
   grep -v '^-- Dump completed' >"$DATABASE" ;;
esac
"""
METRIC = "ictx_backup_last_success_timestamp_seconds"


class Site:
    """A host with a database, a folder, and a repository."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.etc, self.metrics, self.repository = folder / "etc", folder / "metrics", folder / "repository"
        self.database, self.state = folder / "database", folder / "var/state"
        for path in (self.etc, self.metrics, self.state, folder / "bin"):
            path.mkdir(parents=True)
        self.database.write_text("jobs of everybody\n")
        (self.state / "job_state").write_text("queue of everybody\n")
        for name, text in {"mariadb-dump": DUMP, "mariadb": CLIENT}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        restic = Path(distributed("restic")).parent
        monkeypatch.setenv("PATH", f"{folder}/bin:{restic}:{os.environ['PATH']}")
        monkeypatch.setenv("DATABASE", str(self.database))
        monkeypatch.setenv("ICTX_BACKUP_ETC", str(self.etc))
        (self.etc / "password").write_text("secret\n")
        self.settings: dict[str, Any] = {
            "check_read_data": "100%",
            "databases": {"accounting": "accounts"},
            "environment": {},
            "keep": {"last": 2},
            "paths": {"state": str(self.state)},
            "repository": str(self.repository),
            "staging_dir": str(folder / "staging"),
            "textfile_dir": str(self.metrics),
        }

    def __call__(self, *words: str) -> int:
        """Runs the program with the settings of this site; returns its status."""
        (self.etc / "settings.json").write_text(json.dumps(self.settings))
        status: int = loaded(PROGRAM).main(words)
        return status

    def exposed(self) -> dict[str, float]:
        """Returns the time of each backup's last success, as exposed to Prometheus."""
        lines = [line for file in self.metrics.glob("*.prom") for line in file.read_text().splitlines()]
        found = [line.rsplit(" ", 1) for line in lines if line.startswith(METRIC)]
        return {name.removeprefix(f'{METRIC}{{what="').removesuffix('"}'): float(value) for name, value in found}

    def snapshots(self) -> list[str]:
        """Returns the repository's snapshots, oldest first."""
        made = loaded(PROGRAM).Backup(self.settings)
        asked = subprocess.run(
            ["restic", "snapshots", "--json"], env=made.environment, capture_output=True, text=True, check=True
        )
        return [snapshot["tags"][0] for snapshot in sorted(json.loads(asked.stdout), key=lambda one: one["time"])]

    def drafts(self) -> list[Path]:
        """Returns the files that remain of dumps."""
        return [*Path(self.settings["staging_dir"]).glob("dumps/*")]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an empty repository, made once, since its key derivation is slow by design."""
    folder = tmp_path_factory.mktemp("backup")
    with pytest.MonkeyPatch.context() as patch:
        site = Site(folder, patch)
        assert site("init") == 0
        assert site("init") == 0, "an existing repository is kept"
    return site.repository


@pytest.fixture
def site(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Returns a host with an empty repository."""
    made = Site(tmp_path, monkeypatch)
    shutil.copytree(repository, made.repository)
    return made


def test_a_run_saves_everything_encrypted_and_tells_when(site: Site) -> None:
    before = int(loaded(PROGRAM).time.time())
    assert site("run") == 0
    assert site.snapshots() == ["accounting", "state"]
    assert site.exposed().keys() == {"accounting", "state"}
    assert min(site.exposed().values()) >= before
    assert site.drafts() == []
    assert sorted(path.suffix for path in site.metrics.iterdir()) == [".prom", ".prom"]
    stored = [path for path in site.repository.rglob("*") if path.is_file()]
    assert stored
    assert not [path for path in stored if b"everybody" in path.read_bytes()]
    assert not [path for path in stored if path.stat().st_mode & 0o077]


@pytest.mark.parametrize(
    ("fault", "words"), [("down", "mariadb-dump of accounts ended with 2"), ("cut", "accounting.sql is incomplete")]
)
def test_a_dump_that_fails_keeps_its_old_time_and_the_rest_goes_on(
    site: Site, capfd: pytest.CaptureFixture[str], fault: str, words: str
) -> None:
    (site.metrics / "backup_accounting.prom").write_text(f'{METRIC}{{what="accounting"}} 1000\n')
    site.database.with_suffix(f".{fault}").touch()
    assert site("run") == 1
    assert f"ictx-backup: accounting: {'the dump ' if fault == 'cut' else ''}{words}" in capfd.readouterr().err
    assert site.exposed()["accounting"] == 1000
    assert site.exposed()["state"] > 1000
    assert site.snapshots() == ["state"], "an incomplete dump is not saved"
    assert site.drafts() == []


def test_a_folder_that_is_gone_is_named(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.settings["paths"]["lost"] = "/nowhere/at-all"
    assert site("run") == 1
    assert "lost: restic backup of /nowhere/at-all ended with" in capfd.readouterr().err
    assert site.exposed().keys() == {"accounting", "state"}


def test_a_damaged_repository_is_no_success(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    assert site("run") == 0
    for file in site.metrics.iterdir():
        file.unlink()
    pack = next(path for path in (site.repository / "data").rglob("*") if path.is_file())
    content = bytearray(pack.read_bytes())
    content[10] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    assert site("run") == 1
    assert "restic check ended with 1" in capfd.readouterr().err
    assert site.exposed() == {}


def test_old_snapshots_go_by_name(site: Site) -> None:
    assert [site("run") for _ in range(3)] == [0, 0, 0]
    assert sorted(site.snapshots()) == ["accounting"] * 2 + ["state"] * 2


def test_a_database_comes_back_and_the_present_one_is_kept(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    assert site("run") == 0
    site.database.write_text("jobs of nobody\n")
    assert site("restore", "accounting") == 0
    assert "the newest snapshot with the tag accounting-before-restore" in capfd.readouterr().out
    assert site.database.read_text() == "jobs of everybody\n"
    assert site.snapshots()[-1] == "accounting-before-restore"
    assert site.drafts() == []
    site.database.unlink()
    assert site("restore", "accounting") == 0, "a new host has no database yet"
    assert "there was no database accounts before" in capfd.readouterr().out
    assert site.database.read_text() == "jobs of everybody\n"


def test_a_restore_that_breaks_off_says_so_by_its_status(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    assert site("run") == 0
    site.database.with_suffix(".full").touch()
    assert site("restore", "accounting") == 3
    assert "accounts is incomplete" in capfd.readouterr().err


def test_a_folder_comes_back_as_it_was_and_the_present_one_is_kept(site: Site) -> None:
    (site.state / "job_state").chmod(0o640)
    assert site("run") == 0
    (site.state / "job_state").unlink()
    (site.state / "new").touch()
    assert site("restore", "state") == 0
    assert [path.name for path in site.state.iterdir()] == ["job_state"]
    assert (site.state / "job_state").stat().st_mode & 0o777 == 0o640
    (kept,) = [path for path in site.state.parent.iterdir() if path != site.state]
    assert kept.name.startswith("state.before-")
    assert [path.name for path in kept.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("accuonting",), "this host does not back up 'accuonting'; it backs up accounting, state"),
        (("accounting", "deadbeef"), "restic dump ended with 1"),
        (("state", "deadbeef"), "restic restore ended with 1"),
    ],
)
def test_a_restore_of_what_is_not_there_changes_nothing(
    site: Site, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert site("run") == 0
    assert site("restore", *words) == 1
    assert message in capfd.readouterr().err
    assert site.database.read_text() == "jobs of everybody\n"
    assert [path.name for path in site.state.parent.iterdir()] == ["state"]


def test_another_password_is_named(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    (site.etc / "password").write_text("other\n")
    assert site("init") == 1
    assert "has another password than" in capfd.readouterr().err


def opens(site: Site, password: str) -> bool:
    """Returns whether a password opens the repository."""
    file = site.etc / "tried"
    file.write_text(f"{password}\n")
    return bool(loaded(PROGRAM).Backup(site.settings).opens(file))


def test_a_new_password_replaces_the_one_before_and_snapshots_stay(site: Site) -> None:
    assert site("run") == 0
    (site.etc / "password.next").write_text("new\n")
    assert site("init") == 0
    assert (opens(site, "new"), opens(site, "secret")) == (True, False)
    assert site("run") == 0
    assert sorted(site.snapshots()) == ["accounting"] * 2 + ["state"] * 2
    assert sorted(path.name for path in site.etc.glob("password*")) == ["password"]


@pytest.mark.parametrize(
    "cut",
    ["key add", pytest.param("key list", marks=pytest.mark.full), pytest.param("key remove", marks=pytest.mark.full)],
)
def test_a_change_of_password_that_is_cut_off_keeps_backups_running_and_is_completed(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cut: str
) -> None:
    (site.etc / "password.next").write_text("new\n")
    broken = tmp_path / "broken/restic"
    broken.parent.mkdir()
    broken.write_text(f'#!/bin/sh\ncase "$*" in "{cut}"*) exit 1 ;; esac\nexec {distributed("restic")} "$@"\n')
    broken.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
        assert site("init") == 1
    assert opens(site, (site.etc / "password").read_text().strip()), "the one in use opens the repository"
    assert site("run") == 0, "the next backup completes it"
    assert (opens(site, "new"), opens(site, "secret")) == (True, False)
    assert sorted(path.name for path in site.etc.glob("password*")) == ["password"]


def test_a_new_password_for_a_repository_that_is_not_there_makes_it(site: Site) -> None:
    shutil.rmtree(site.repository)
    (site.etc / "password.next").write_text("new\n")
    assert site("init") == 0
    assert opens(site, "new")


def test_without_a_folder_for_metrics_it_says_so(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.metrics.rmdir()
    assert site("run") == 0
    assert "Prometheus will not see this backup" in capfd.readouterr().err


def test_a_missing_repository_is_named(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(site.repository)
    assert site("run") == 1
    assert f"unable to open config file: stat {site.repository}/config" in capfd.readouterr().err
