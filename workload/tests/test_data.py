"""Corpora become tokens and tokens become batches: nothing lost, nothing twice, the same every time."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Commands
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ictx.cli import main
from ictx.data.loader import Batches, TokenArray
from ictx.data.prepare import END_OF_TEXT, DataConfig, prepare
from ictx.errors import UserError

CONFIG = DataConfig(vocab_size=VOCABULARY, min_bytes=100_000, validation_share=0.1)


def tokens_of(directory: Path, split: str) -> np.ndarray:
    return np.fromfile(directory / f"{split}.bin", json.loads((directory / "meta.json").read_text())["dtype"])


def test_every_document_comes_back_once(tmp_path: Path, corpus: Path) -> None:
    source = tmp_path / "corpus"
    shutil.copytree(corpus, source, ignore=shutil.ignore_patterns("__pycache__"))
    texts = {file.read_bytes().decode() for file in source.rglob("*") if file.is_file()} - {""}
    (source / "again.py").write_text(next(iter(texts)))
    (source / "packed.gz").write_bytes(gzip.compress("packed ünïcode 🎉\n".encode()))
    (source / "broken.gz").write_bytes(b"\x1f\x8b not a gzip file")
    (source / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (source / "table.bin").write_bytes(b"text with \0 in it")
    directory = prepare([source], tmp_path / "out", CONFIG)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    decoded = []
    for split in ("train", "validation"):
        text = tokenizer.decode(tokens_of(directory, split).tolist(), skip_special_tokens=False)
        decoded += text.removesuffix(END_OF_TEXT).split(END_OF_TEXT)
    assert sorted(decoded) == sorted(texts | {"packed ünïcode 🎉\n"})


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(tmp_path: Path, corpus: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in sorted((file for file in corpus.rglob("*.*") if file.suffix != ".pyc"), reverse=True):
        target = moved / file.relative_to(corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    first, second = prepare([corpus], tmp_path / "1", CONFIG), prepare([moved], tmp_path / "2", CONFIG)
    assert first.name == second.name
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_what_is_prepared_is_not_prepared_again(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = prepare([corpus], tmp_path, CONFIG)
    before = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    capsys.readouterr()
    assert prepare([corpus], tmp_path, CONFIG) == directory
    assert "nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in directory.iterdir()} == before
    assert prepare([corpus], tmp_path, dataclasses.replace(CONFIG, vocab_size=300)) != directory


def test_unigram_entropy_is_the_cross_entropy_of_frequencies(prepared: Path) -> None:
    train, validation = tokens_of(prepared, "train"), tokens_of(prepared, "validation")
    frequency = {token: (train == token).sum() + 1 for token in range(VOCABULARY)}
    total = sum(frequency.values())
    expected = -np.mean([np.log(frequency[token] / total) for token in validation])
    assert json.loads((prepared / "meta.json").read_text())["unigram_entropy"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("missing", [], "corpus path {} does not exist"),
        ("empty", [], "corpus path {} is empty"),
        ("small", [], "corpus {} has 6 bytes of text: at least 100,000"),
        ("small", ["data.min_bytes=1"], "the corpus yields only"),
        ("small", ["data.vocab_size=5"], "data.vocab_size is 5: expected at least 257"),
        ("small", ["data.minbytes=5"], "unknown setting data.minbytes: did you mean data.min_bytes?"),
        ("small", ["data.vocab_size=[1"], "--set data.vocab_size=[1"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    commands: Commands,
    tmp_path: Path,
    path: str,
    settings: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.txt").write_text("hello\n")
    config, out = commands.folder / "test.yaml", tmp_path / "out"
    arguments = ["data", "prepare", "--config", config, "--corpus", tmp_path / path, "--out", out]
    monkeypatch.setattr("sys.argv", ["ictx", *map(str, arguments), *(f"--set={value}" for value in settings)])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("ictx: ")
    assert message.format(tmp_path / path) in error
    assert error.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(commands: Commands, tmp_path: Path, corpus: Path) -> None:
    arguments = ["data", "prepare", "--config", commands.folder / "test.yaml", "--corpus", corpus, "--out", tmp_path]
    ended = commands.run(*arguments, prefix=("prlimit", "--fsize=65536"))
    assert ended.status == 2, ended
    assert ended.err.startswith(f"ictx: cannot write {tmp_path}")
    assert ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_never_taken_for_complete_and_goes_after_a_day(
    commands: Commands, tmp_path: Path, corpus: Path
) -> None:
    arguments = ["data", "prepare", "--config", commands.folder / "test.yaml", "--corpus", corpus, "--out", tmp_path]
    process = commands.start(*arguments)
    while not (left := list(tmp_path.iterdir())) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert len(left) == 1
    ended = commands.run(*arguments)
    assert ended.status == 0, ended.err
    assert "training and" in ended.out
    assert left[0].exists(), "another run could still be writing there"
    yesterday = time.time() - 25 * 3600
    os.utime(left[0], (yesterday, yesterday))
    assert commands.run(*arguments).status == 0
    assert [path.name for path in tmp_path.iterdir()] == [Path(ended.out.split()[-1]).name]


def test_a_run_with_the_number_of_a_killed_one_prepares_anew(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process of every container has number 1, on every node."""
    with monkeypatch.context() as killed:
        killed.setattr("ictx.data.prepare.shutil.rmtree", lambda *_, **__: None)
        killed.setattr("ictx.data.prepare.train_tokenizer", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            prepare([corpus], tmp_path, CONFIG)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    assert (prepare([corpus], tmp_path, CONFIG) / "meta.json").exists()


def test_a_split_that_lost_its_end_is_refused(prepared: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(prepared.resolve(), broken)
    (broken / "train.bin").write_bytes((broken / "train.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.bin has .* tokens, but .* prepare it again"):
        TokenArray.open(broken, "train")
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenArray.open(tmp_path, "train")


def array(windows: int, length: int) -> TokenArray:
    """Tokens that number themselves: window w starts with w × length."""
    return TokenArray(np.arange(windows * length + 1, dtype=np.int64), {})


@given(
    windows=st.integers(8, 60), batch=st.integers(1, 4), ranks=st.sampled_from([1, 2]), seed=st.integers(0, 2**32 - 1)
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_window_once(windows: int, batch: int, ranks: int, seed: int) -> None:
    loaders = [Batches(array(windows, 5), 5, batch, rank, ranks, seed) for rank in range(ranks)]
    seen: list[int] = []
    while len(seen) < 2 * windows:
        for loader in loaders:
            rows = loader.next()
            assert torch.equal(rows[:, 1:], rows[:, :1] + torch.arange(1, 6)), "inputs and targets follow each other"
            seen += (rows[:, 0] // 5).tolist()
    assert sorted(seen[:windows]) == sorted(seen[windows : 2 * windows]) == list(range(windows))


@given(done=st.integers(0, 40), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_batches_go_on_where_they_stood_on_any_number_of_ranks(done: int, seed: int) -> None:
    data = array(30, 4)
    one = Batches(data, 4, 4, 0, 1, seed)
    for _ in range(done):
        one.next()
    two = [Batches(data, 4, 2, rank, 2, seed) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(one.state_dict())
    for _ in range(10):
        assert torch.equal(one.next(), torch.cat([loader.next() for loader in two]))


def test_other_seeds_give_other_orders() -> None:
    first, second = (Batches(array(30, 4), 4, 8, 0, 1, seed).next() for seed in (1, 2))
    assert not torch.equal(first, second)


def test_too_little_data_for_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="has 3 windows of 4 tokens, but a global batch takes 8"):
        Batches(array(3, 4), 4, 4, 0, 2, 0)
