"""The module install_files installs all files of a role in one run, all or none."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import play

GREETING = "HELLO template\n\u00fc\n"
OWN = {"owner": str(os.getuid()), "group": str(os.getgid())}


class Place:
    """A folder for the module to work in, with the result of its last run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.results = folder, folder / "root", folder / "results.json"
        self.root.mkdir()
        (folder / "templates").mkdir()
        (folder / "templates/greeting.j2").write_text("{% include 'loud.j2' %}\u00fc\n")
        (folder / "templates/loud.j2").write_text("{% if loud %}\nHELLO {{ name }}\n{% endif %}\n")

    def run(self, *wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Runs the module for each argument in one play and returns the results; `root/` in paths is this folder."""
        tasks: list[dict[str, Any]] = []
        for number, arguments in enumerate(wanted):
            given, check = dict(arguments), arguments.get("check", False)
            given.pop("check", None)
            for kind in {"folders", "files"} & given.keys():
                given[kind] = [OWN | entry for entry in given[kind]]
            placed = json.loads(json.dumps(given).replace("root/", f"{self.root}/"))
            task = {"install_files": placed, "check_mode": check, "diff": True, "ignore_errors": True}
            tasks.append(task | {"register": f"done{number}"})
        results = ", ".join(f"done{number}" for number in range(len(wanted)))
        tasks.append(
            {"ansible.builtin.copy": {"content": f"{{{{ [{results}] | to_json }}}}", "dest": str(self.results)}}
        )
        ended = play(self.folder, tasks, {"loud": True, "name": "world"})
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found: list[dict[str, Any]] = json.loads(self.results.read_text())
        return found

    def paths(self) -> list[str]:
        """Returns the paths that exist, relative to the folder."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    # The modes must not depend on the site's umask.
    before = os.umask(0o077)
    yield Place(tmp_path)
    os.umask(before)


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


def wanted(**changes: str) -> dict[str, Any]:
    return {
        "folders": [{"path": "root/etc/one"}, {"path": "root/etc/secret", "mode": "0700"}],
        "files": [
            {"template": "greeting.j2", "dest": "root/etc/one/a", "vars": {"name": "template"}},
            {"content": "key\n", "dest": "root/etc/secret/key", "mode": "0600"} | changes,
        ],
        "absent": ["root/old"],
    }


def test_makes_what_is_listed_and_then_nothing(place: Place) -> None:
    (place.root / "old").touch()
    planned, done, again = place.run(wanted() | {"check": True}, wanted(), wanted())
    assert planned["changes"] == done["changes"], "a check run reports the same changes"
    assert [path.removeprefix(f"{place.root}/") for path in done["changes"]] == [
        *("etc/one", "etc/secret", "etc/one/a", "etc/secret/key", "old")
    ]
    assert (again["changed"], again["changes"], again["diff"]) == (False, [], [])
    assert place.paths() == ["etc", "etc/one", "etc/one/a", "etc/secret", "etc/secret/key"]
    assert [mode(place.root / path) for path in place.paths()] == ["0755", "0755", "0644", "0700", "0600"]
    assert (place.root / "etc/one/a").read_text() == GREETING


def test_the_journal_has_paths_and_no_texts(place: Place) -> None:
    """A module of this name replaces the machine's log."""
    log = place.folder / "log"
    keeps = f"def syslog(_, text): print(text, file=open({str(log)!r}, 'a'))\ndef openlog(*_): pass\n"
    (place.folder / "syslog.py").write_text(f"LOG_INFO = LOG_USER = 0\n{keeps}")
    files = [OWN | {"content": "opensesame\n", "dest": f"{place.root}/key"}]
    task = {"install_files": {"files": files, "absent": [f"{place.root}/old"]}, "diff": False}
    ended = play(place.folder, [task], {}, environment={"PYTHONPATH": str(place.folder)})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    logged = log.read_text()
    assert logged == f"Invoked for 0 folders and {place.root}/key, {place.root}/old\n"


def test_a_check_run_touches_nothing(place: Place) -> None:
    (place.root / "old").touch()
    assert place.run(wanted() | {"check": True})[0]["changed"]
    assert place.paths() == ["old"]


def test_repairs_what_differs_and_replaces_nothing_unless_all_is_valid(place: Place) -> None:
    place.run(wanted())
    key, greeting = place.root / "etc/secret/key", place.root / "etc/one/a"
    key.chmod(0o644)
    # A link is replaced, not followed, since its target belongs to somebody else.
    greeting.unlink()
    (place.root / "other").write_text("mine")
    greeting.symlink_to(place.root / "other")
    # A read of this FIFO would block forever.
    os.mkfifo(place.root / "pipe")
    (place.root / "latin").write_bytes(b"caf\xe9")
    odd = [{"content": "text\n", "dest": f"root/{name}"} for name in ("pipe", "latin")]
    new = {"content": "new\n", "dest": "root/etc/one/a"}
    bad = {"content": "worse\n", "dest": "root/etc/secret/key", "validate": "grep -q better %s"}
    repaired, replaced, refused, accepted = place.run(
        wanted(),
        {"files": odd},
        {"files": [new, bad]},
        {"files": [bad | {"content": "better\n"}]},
    )
    assert repaired["changes"] == [str(greeting), str(key)]
    assert repaired["diff"][0]["after"] == GREETING
    assert (greeting.is_symlink(), (place.root / "other").read_text()) == (False, "mine")
    assert replaced["changes"] == [str(place.root / name) for name in ("pipe", "latin")]
    assert {(place.root / name).read_text() for name in ("pipe", "latin")} == {"text\n"}
    assert refused["msg"].startswith(f"{key} was not changed, because its new content is not valid")
    assert greeting.read_text() == GREETING, "the valid one is not replaced either"
    assert accepted["changed"]
    assert (key.read_text(), mode(key)) == ("better\n", "0644")
    assert not list(place.root.rglob(".ictx-*"))


def test_names_what_is_wrong(place: Place) -> None:
    (place.root / "file").touch()
    (place.root / "folder").mkdir()
    wrong = {
        "exactly one of template, src, content is required, got none": {"files": [{"dest": "root/a"}]},
        "got ['src', 'content']": {"files": [{"dest": "root/a", "src": "b", "content": "c"}]},
        "root/no does not exist: list it under folders": {"files": [{"dest": "root/no/a", "content": "c"}]},
        "root/file is not a folder: move it away": {"folders": [{"path": "root/file"}]},
        "root/folder is a folder: move it away": {"files": [{"dest": "root/folder", "content": "c"}]},
        "absent.j2": {"files": [{"dest": "root/a", "template": "absent.j2"}]},
    }
    for message, done in zip(wrong, place.run(*wrong.values()), strict=True):
        assert done["failed"], message
        assert message in done["msg"]
