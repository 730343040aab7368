"""Prepared data is used only if a trusted user wrote it and it is unchanged; no user can block others."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCABULARY, Commands

from ictx.data.config import DataConfig
from ictx.data.contents import verify
from ictx.data.prepare import prepare
from ictx.errors import UserError
from ictx.manifest import digest
from ictx.train.config import load
from ictx.train.pretrain import main as train

MALLORY = 2003
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to change owners")


@pytest.fixture
def config(prepared: Path) -> DataConfig:
    return DataConfig(vocab_size=VOCABULARY, min_bytes=100_000, validation_share=0.1, tokenizer=prepared)


def overwrite_tokens(directory: Path) -> None:
    """Replaces every token without a change of the file's size."""
    for file in directory.glob("train-*.bin"):
        file.write_bytes(b"\x2a\x00" * (file.stat().st_size // 2))


def give_to(user: int, directory: Path) -> None:
    for path in [directory, *directory.iterdir()]:
        os.chown(path, user, user)


def with_right_checksums(directory: Path) -> None:
    meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
    for entry in meta["splits"]["train"]:
        entry["sha256"] = {name: digest(directory / name).sha256 for name in entry["sha256"]}
    (directory / "meta.json").write_text(json.dumps(meta))


@pytest.mark.attack(
    "H2",
    "all tokens of a prepared corpus are overwritten, under the name that the next job uses",
    before="`ictx data prepare` reported that it holds the corpus already, and the job trained on it",
    now="the file is reported, and the job prepares its own copy",
)
def test_data_that_was_changed_is_prepared_anew(
    tmp_path: Path, corpus: Path, config: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare([corpus], tmp_path, config)
    good = (first / "train-00000.bin").read_bytes()
    overwrite_tokens(first)
    second = prepare([corpus], tmp_path, config)
    assert f"not used: {first}/train-00000.bin: its SHA-256 is" in capsys.readouterr().out
    assert second.name.startswith(f"{first.name}-")
    assert (second / "train-00000.bin").read_bytes() == good
    assert prepare([corpus], tmp_path, config) == second, "the new data is reused"


@pytest.mark.attack(
    "H2",
    "another user creates the corpus first, with other tokens and matching checksums",
    before="used by every job with this corpus",
    now="not used, whatever its checksums; the job trains on its own copy with an unpredictable name",
)
@as_root
def test_data_of_another_user_is_neither_used_nor_in_the_way(
    tmp_path: Path,
    corpus: Path,
    config: DataConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    his = prepare([corpus], tmp_path, config)
    overwrite_tokens(his)
    with_right_checksums(his)
    verify(his)
    give_to(MALLORY, his)
    shutil.copytree(his, more := tmp_path / f"{his.name}-000000000000")
    give_to(MALLORY, more)
    own = prepare([corpus], tmp_path, config)
    assert own not in (his, more)
    out = capsys.readouterr().out
    assert f"not used: {his}: belongs to user id {MALLORY}, not to 0 (data.trusted_owners, data.trusted_dirs)" in out
    assert "not used for similar reasons: 1 more folders with this name" in out
    assert prepare([corpus], tmp_path, config) == own
    assert (own / "train-00000.bin").read_bytes() != (his / "train-00000.bin").read_bytes()
    monkeypatch.setenv("ICTX_TRUSTED_DATA", f"/nowhere:{his}")
    given = DataConfig(VOCABULARY, 100_000, 0.1, tokenizer=config.tokenizer)
    for trusting in (
        dataclasses.replace(config, trusted_owners=(MALLORY,)),
        dataclasses.replace(config, trusted_dirs=(his,)),
        given,
    ):
        assert prepare([corpus], tmp_path, trusting) == his


def deep(path: Path) -> None:
    path.mkdir()
    (path / "meta.json").write_text("[" * 100_000)


TAKEN: list[Callable[[Path], object]] = [
    Path.touch,
    os.mkfifo,
    lambda path: path.symlink_to("/etc"),
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("nowhere"),
    lambda path: (path.mkdir(), (path / "meta.json").symlink_to("/dev/zero")),
    lambda path: (path.mkdir(), os.mkfifo(path / "meta.json")),
    deep,
]


@pytest.mark.parametrize("take", TAKEN)
def test_whatever_has_the_name_the_job_gets_its_data(
    tmp_path: Path, corpus: Path, config: DataConfig, take: Callable[[Path], object]
) -> None:
    name = prepare([corpus], tmp_path / "elsewhere", config).name
    out = tmp_path / "out"
    out.mkdir()
    take(out / name)
    directory = prepare([corpus], out, config)
    assert directory.parent == out
    assert directory.name.startswith(f"{name}-")
    verify(directory)


@as_root
def test_what_root_prepared_is_shared(
    tmp_path: Path, corpus: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = prepare([corpus], tmp_path, config)
    monkeypatch.setattr("ictx.manifest.os.geteuid", lambda: 2001)
    assert prepare([corpus], tmp_path, config) == directory
    directory.chmod(0o775)
    assert prepare([corpus], tmp_path, config) != directory


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_everybody_can_read_what_is_prepared_and_its_owner_can_write(
    tmp_path: Path, corpus: Path, config: DataConfig, umask: int
) -> None:
    before = os.umask(umask)
    try:
        directory = prepare([corpus], tmp_path, config)
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o7777 == 0o755
    assert {file.stat().st_mode & 0o7777 for file in directory.iterdir()} == {0o644}


@as_root
def test_drafts_of_others_stay_and_stop_nobody(tmp_path: Path, corpus: Path, config: DataConfig) -> None:
    draft = tmp_path / ".0123456789abcdef.0123456789ab.part"
    draft.mkdir()
    (draft / "train-00000.bin").symlink_to("nowhere")
    for path in (draft / "train-00000.bin", draft):
        os.chown(path, MALLORY, MALLORY, follow_symlinks=False)
        os.utime(path, (0, 0), follow_symlinks=False)
    prepare([corpus], tmp_path, config)
    assert draft.exists()
    os.chown(draft, 0, 0)
    prepare([corpus], tmp_path, config)
    assert not draft.exists()


@pytest.mark.attack(
    "H2",
    "the tokens are changed after the corpus was prepared, or before the job restarts",
    before="trained on",
    now="every start verifies the checksums and the owner of the data",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overwrite_tokens, r"train-00000\.bin: its SHA-256 is"),
        (lambda d: os.truncate(d / "train-00000.bin", 100), r"train-00000\.bin: has 100 bytes instead of"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json: its SHA-256 is"),
        (lambda d: (d / "train-00000.bin").chmod(0o666), r"train-00000\.bin: others can write to it"),
        (lambda d: (d / "meta.json").write_text("[" * 100_000), "holds no prepared data"),
        pytest.param(lambda d: give_to(MALLORY, d), f"belongs to user id {MALLORY}.*ictx data prepare", marks=as_root),
    ],
)
def test_a_run_reads_no_data_that_changed(
    commands: Commands, prepared: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    data = shutil.copytree(prepared.resolve(), tmp_path / "data")
    (tmp_path / "link").symlink_to(data)
    change(data)
    wanted = [f"run.dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'link'}"]
    with pytest.raises(UserError, match=message):
        train(load(str(commands.folder / "test.yaml"), wanted))
    made = {path.name for path in (tmp_path / "run").glob("*")}
    assert not made & {"about.json", "checkpoints", "metrics.jsonl", "model.yaml", "export"}, "only a lock may exist"


def test_lists_of_settings_are_checked_by_their_elements(commands: Commands) -> None:
    file = str(commands.folder / "test.yaml")
    data = load(file, ["data.trusted_owners=[0, 2001]", "data.trusted_dirs=[/shared/data/a]"]).data
    assert (data.trusted_owners, data.trusted_dirs) == ((0, 2001), (Path("/shared/data/a"),))
    for setting, message in {
        "data.trusted_owners=[0, bob]": r"setting data.trusted_owners\[1\] is 'bob': expected int",
        "data.trusted_owners=2001": "setting data.trusted_owners is 2001: expected a list",
    }.items():
        with pytest.raises(UserError, match=message):
            load(file, [setting])
