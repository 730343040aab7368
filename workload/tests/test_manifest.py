"""A manifest detects every change in a folder; an invalid manifest is an error of one line with the file's name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ictx import manifest
from ictx.manifest import MANIFEST_FILE, Entry, Unusable, check_owner, hash_files, list_files, read, verify, write

HASH = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a manifest."""
    directory = tmp_path / "folder"
    (directory / "below").mkdir(parents=True)
    (directory / "a.bin").write_bytes(bytes(range(256)) * 20_000)
    (directory / "below" / "b.bin").write_bytes(b"text")
    (directory / "empty").touch()
    write(directory, hash_files(directory, list_files(directory)))
    return directory


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def test_what_was_written_verifies(folder: Path) -> None:
    entries = verify(folder)
    assert set(entries) == {"a.bin", "below/b.bin", "empty"}
    assert entries["below/b.bin"] == Entry("982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1", 4)
    with pytest.raises(FileExistsError):
        write(folder, entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: flip(d / "a.bin"), r"a\.bin: its SHA-256 is \w+ instead of \w+"),
        (lambda d: os.truncate(d / "a.bin", 100), r"a\.bin: has 100 bytes instead of 5,120,000"),
        (lambda d: os.truncate(d / "a.bin", 0), r"a\.bin: has 0 bytes instead of 5,120,000"),
        (lambda d: (d / "below" / "b.bin").unlink(), r"below/b\.bin: is missing"),
        (lambda d: (d / "below" / "c.bin").touch(), r"below/c\.bin: is not in the manifest"),
        (lambda d: (d / "c\nd\udcff").touch(), r"'c\\nd\\udcff': is not in the manifest$"),
        (lambda d: (d / MANIFEST_FILE).unlink(), rf"{MANIFEST_FILE}: No such file"),
        (lambda d: replace_by(d / "a.bin", lambda p: p.symlink_to("/dev/zero")), r"a\.bin: is a symbolic link"),
        (lambda d: replace_by(d / "a.bin", os.mkfifo), r"a\.bin: is a symbolic link or a special file"),
        (lambda d: replace_by(d / "a.bin", Path.mkdir), r"a\.bin: is missing"),
        (lambda d: replace_by(d / MANIFEST_FILE, os.mkfifo), rf"{MANIFEST_FILE}: is not a regular file"),
        (lambda d: replace_by(d / MANIFEST_FILE, Path.mkdir), rf"{MANIFEST_FILE}: is not a regular file"),
        (lambda d: replace_by(d / MANIFEST_FILE, lambda p: p.symlink_to("a.bin")), "is a symbolic link"),
        (lambda d: os.truncate(d / MANIFEST_FILE, 1 << 30), f"{MANIFEST_FILE}: has more than 16 MiB"),
    ],
)
def test_what_changed_is_named(folder: Path, change: Callable[[Path], object], message: str) -> None:
    change(folder)
    with pytest.raises(Unusable, match=f"^{folder}/.*{message}"):
        verify(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b"null",
        b'{"format": 1}',
        json.dumps({"format": 2, "files": {}}).encode(),
        *(
            json.dumps({"format": 1, "files": {name: {"sha256": HASH, "size": 1}}}).encode()
            for name in ["", ".", "..", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\0b", "a\nb", "\ud800"]
        ),
        *(
            json.dumps({"format": 1, "files": {"a": entry}}).encode()
            for entry in [
                None,
                HASH,
                {"sha256": HASH},
                {"sha256": HASH.upper() + "A", "size": 1},
                {"sha256": HASH, "size": True},
                {"sha256": HASH, "size": -1},
                {"sha256": HASH, "size": 1.0},
                {"sha256": HASH, "size": 1, "more": 1},
            ]
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(Unusable, match=f"^{tmp_path / MANIFEST_FILE}: [^\n]+$"):
        read(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
FILES = st.dictionaries(st.text(), st.fixed_dictionaries({"sha256": JSON | st.just(HASH), "size": JSON}) | JSON)


@given(content=st.binary() | JSON | st.fixed_dictionaries({"format": st.just(1), "files": FILES}))
def test_any_manifest_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    directory = tmp_path_factory.mktemp("manifest")
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / MANIFEST_FILE).write_bytes(encoded)
    try:
        entries = read(directory)
        manifest.check_names(directory, entries)
    except Unusable as error:
        assert str(error).startswith(str(directory))
        assert "\n" not in str(error)
    else:
        assert not entries


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o775, 0o757])
def test_only_what_nobody_else_can_write_is_accepted(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    if mode == 0o755:
        check_owner(path)
        return
    with pytest.raises(Unusable, match=f"{path}: others can write to it .mode 0{mode:o}.*chmod go-w"):
        check_owner(path)


def test_what_belongs_to_another_is_refused_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.geteuid()
    monkeypatch.setattr("ictx.manifest.os.geteuid", lambda: mine + 1)
    with pytest.raises(Unusable, match=f"{tmp_path}: belongs to user id {mine}, not to {mine + 1}"):
        check_owner(tmp_path)
    check_owner(tmp_path, allowed=[mine])
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(Unusable, match="link: is a symbolic link"):
        check_owner(tmp_path / "link", allowed=[mine])
    with pytest.raises(Unusable, match="none: No such file"):
        check_owner(tmp_path / "none")
