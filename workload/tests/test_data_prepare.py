"""Preparation of corpora: complete, reproducible, atomic, and with detection of damage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOCABULARY, Commands
from tokenizers import Tokenizer

from ictx.cli import main
from ictx.data import encode
from ictx.data.config import DataConfig
from ictx.data.contents import verify
from ictx.data.corpus import Corpus, Document
from ictx.data.prepare import prepare
from ictx.data.progress import Progress
from ictx.data.shards import SplitName, TokenArray
from ictx.data.stream import Stream
from ictx.data.tokenizer import END_OF_TEXT
from ictx.errors import UserError

CONFIG = DataConfig(vocab_size=VOCABULARY, min_bytes=100_000, validation_share=0.1)
SPLITS: tuple[SplitName, ...] = ("train", "validation")


def meta_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "meta.json").read_text())
    return content


def tokens_of(directory: Path, split: str) -> np.ndarray:
    files = sorted(directory.glob(f"{split}-*.bin"))
    return np.concatenate([np.fromfile(file, meta_of(directory)["dtype"]) for file in files])


def texts_of(directory: Path, split: str) -> list[str]:
    """Returns the documents of a split, by the index."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = []
    for file in sorted(directory.glob(f"{split}-*.bin")):
        tokens, start = np.fromfile(file, meta_of(directory)["dtype"]), 0
        for end in np.fromfile(file.with_suffix(".idx"), "<i8"):
            assert tokens[end - 1] == 0
            texts.append(tokenizer.decode(tokens[start : end - 1].tolist(), skip_special_tokens=False))
            start = end
        assert start == len(tokens)
    return texts


@pytest.mark.parametrize("shard_bytes", [1 << 30, 60_000])
def test_every_document_comes_back_once(tmp_path: Path, corpus: Path, shard_bytes: int) -> None:
    source = tmp_path / "corpus"
    shutil.copytree(corpus, source, ignore=shutil.ignore_patterns("__pycache__"))
    texts = {file.read_bytes().decode() for file in source.rglob("*") if file.is_file()} - {""}
    (source / "again.py").write_text(next(iter(texts)))
    (source / "control.txt").write_text(f"a{END_OF_TEXT}b")
    (source / "long.txt").write_text("word " * 20_000)
    assert encode.PIECE < 5 * 20_000
    directory = prepare([source], tmp_path / "out", dataclasses.replace(CONFIG, shard_bytes=shard_bytes))
    decoded = [text for split in SPLITS for text in texts_of(directory, split)]
    assert sorted(decoded) == sorted(texts | {f"a{END_OF_TEXT}b", "word " * 20_000})
    shards = len(list(directory.glob("train-*.bin")))
    assert shards == 1 if shard_bytes == 1 << 30 else shards > 3


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


def test_a_document_stays_in_its_split_when_the_corpus_grows(tmp_path: Path, corpus: Path, prepared: Path) -> None:
    (tmp_path / "more.txt").write_text("more " * 100)
    config = dataclasses.replace(CONFIG, tokenizer=prepared, shard_bytes=70_000)
    few, many = (prepare(sources, tmp_path / "out", config) for sources in ([corpus], [corpus, tmp_path / "more.txt"]))
    assert few != many
    for split in SPLITS:
        assert set(texts_of(few, split)) <= set(texts_of(many, split))
    share = meta_of(few)["splits"]["validation"][0]["documents"] / len(texts_of(few, "train"))
    assert 0 < share < 0.5


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
    assert prepare([corpus], tmp_path, dataclasses.replace(CONFIG, tokenizer=directory)) != directory


def test_a_tokenizer_that_is_given_is_used(tmp_path: Path, corpus: Path, prepared: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("Entirely other words, 123456. " * 10)
    (tmp_path / "other" / "b.txt").write_text("ß" * 100)
    config = dataclasses.replace(CONFIG, min_bytes=1, tokenizer=prepared, validation_share=0.5)
    for seed in range(20):
        try:
            directory = prepare([tmp_path / "other"], tmp_path / "out", dataclasses.replace(config, seed=seed))
            break
        except UserError as error:
            assert "too few documents for a validation share of 0.5" in str(error)
    assert (directory / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    assert {text[0] for split in SPLITS for text in texts_of(directory, split)} == {"E", "ß"}


def test_a_tokenizer_is_trained_on_a_sample_of_a_large_corpus(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def watched(documents: Iterator[str], vocab_size: int) -> Tokenizer:
        from ictx.data.tokenizer import train_tokenizer

        def each() -> Iterator[str]:
            for text in documents:
                taken.append(text)
                yield text

        return train_tokenizer(each(), vocab_size)

    monkeypatch.setattr("ictx.data.prepare.train_tokenizer", watched)
    total = meta_of(prepare([corpus], tmp_path, dataclasses.replace(CONFIG, tokenizer_bytes=150_000)))["corpus_bytes"]
    assert 50_000 < sum(map(len, taken)) < 250_000 < total
    sample = set(taken)
    taken.clear()
    prepare([corpus], tmp_path / "again", dataclasses.replace(CONFIG, tokenizer_bytes=150_000))
    assert set(taken) == sample


def test_unigram_entropy_is_the_cross_entropy_of_frequencies(prepared: Path) -> None:
    train, validation = tokens_of(prepared, "train"), tokens_of(prepared, "validation")
    frequency = {token: (train == token).sum() + 1 for token in range(VOCABULARY)}
    total = sum(frequency.values())
    expected = -np.mean([np.log(frequency[token] / total) for token in validation])
    assert meta_of(prepared)["unigram_entropy"] == pytest.approx(expected, rel=1e-9)


def test_windows_run_across_shards(tmp_path: Path, corpus: Path) -> None:
    directory = prepare([corpus], tmp_path, dataclasses.replace(CONFIG, shard_bytes=60_000))
    data, tokens = TokenArray.open(directory, "train"), tokens_of(directory, "train").astype(np.int64)
    length = 25_000
    assert len(data.shards) > 3
    assert data.windows(length) == (len(tokens) - 1) // length
    for index in range(data.windows(length)):
        window, lengths = data.window(index, length)
        assert window.tolist() == tokens[index * length : (index + 1) * length + 1].tolist()
        # A document ends with token 0 and has no other token 0.
        assert (np.cumsum(lengths)[:-1] - 1).tolist() == np.flatnonzero(window[:-1] == 0).tolist()


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("missing", [], "corpus path {} does not exist"),
        ("empty", [], "corpus path {} is empty"),
        ("small", [], "corpus path {} has 6 bytes of text: at least 100,000"),
        ("small", ["data.min_bytes=1"], "the corpus yields only"),
        ("small", ["data.vocab_size=5"], "data.vocab_size is 5: expected at least 264"),
        ("small", ["data.shard_bytes=0"], "data.shard_bytes is 0: expected 1 or more"),
        ("small", ["data.minbytes=5"], "unknown setting data.minbytes: did you mean data.min_bytes?"),
        ("small", ["data.vocab_size=[1"], "--set data.vocab_size=[1"),
        ("small", ["data.tokenizer=/nowhere"], "/nowhere/tokenizer.json: No such file or directory"),
        ("lines.jsonl", [], "{} line 1 is not a JSON object with text in 'text' (data.text_field)"),
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
    (tmp_path / "lines.jsonl").write_text('{"body": "text"}\n')
    config, out = commands.folder / "test.yaml", tmp_path / "out"
    arguments = ["data", "prepare", "--config", config, "--corpus", tmp_path / path, "--out", out]
    monkeypatch.setattr("sys.argv", ["ictx", *map(str, arguments), *(f"--set={value}" for value in settings)])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("ictx: ")
    assert message.format(tmp_path / path) in error
    assert error.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def test_a_corpus_that_changes_meanwhile_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(corpus, tmp_path / "corpus")
    scan = Corpus.scan

    def changing(self: Corpus) -> Any:
        found = scan(self)
        (source / "charset.py").write_text("changed")
        return found

    monkeypatch.setattr(Corpus, "scan", changing)
    with pytest.raises(UserError, match=r"corpus path .*/corpus\) changed while it was read: run again"):
        prepare([source], tmp_path / "out", CONFIG)
    assert not list((tmp_path / "out").iterdir())


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
    assert left[0].exists(), "another run may still be writing there"
    yesterday = time.time() - 25 * 3600
    (left[0] / "train-00000.bin").write_bytes(b"")
    os.utime(left[0], (yesterday, yesterday))
    assert commands.run(*arguments).status == 0
    assert left[0].exists(), "a file in it was changed recently"
    for file in left[0].iterdir():
        os.utime(file, (yesterday, yesterday))
    assert commands.run(*arguments).status == 0
    assert [path.name for path in tmp_path.iterdir()] == [Path(ended.out.split()[-1]).name]


def test_a_run_with_the_number_of_a_killed_one_prepares_anew(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process of every container has PID 1, on every node."""
    with monkeypatch.context() as killed:
        killed.setattr("ictx.data.publish.shutil.rmtree", lambda *_, **__: None)
        killed.setattr("ictx.data.prepare.train_tokenizer", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            prepare([corpus], tmp_path, CONFIG)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    assert (prepare([corpus], tmp_path, CONFIG) / "meta.json").exists()


def test_files_that_are_missing_or_have_another_length_are_refused_at_once(prepared: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(prepared.resolve(), tmp_path / "broken")
    content = (broken / "train-00000.bin").read_bytes()
    (broken / "train-00000.bin").write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin has .* tokens, but .* prepare it again"):
        TokenArray.open(broken, "train")
    (broken / "train-00000.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train-00000\.bin has .*\.5 tokens, but .* prepare it again"):
        TokenArray.open(broken, "train")
    (broken / "validation-00000.idx").unlink()
    with pytest.raises(UserError, match=r"validation-00000\.idx: No such file .* prepare it again"):
        TokenArray.open(broken, "validation")
    with pytest.raises(UserError, match="holds no prepared data"):
        TokenArray.open(tmp_path, "train")
    (broken / "meta.json").write_text(json.dumps(meta_of(broken) | {"format": 1}))
    with pytest.raises(UserError, match=r"broken has format 1, but this version reads 2"):
        TokenArray.open(broken, "train")


def test_a_token_beyond_the_vocabulary_is_named(prepared: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(prepared.resolve(), tmp_path / "broken")
    for split in SPLITS:
        path = broken / f"{split}-00000.bin"
        path.write_bytes(b"\xff\xff" + path.read_bytes()[2:])
        data = TokenArray.open(broken, split)
        message = f"{broken} holds token 65535, but its vocabulary has {VOCABULARY} entries: prepare it again"
        with pytest.raises(UserError, match=message):
            data.window(0, 10)
        with pytest.raises(UserError, match=message):
            Stream(data, 10, 0).read(0, len(data))


def test_settings_of_a_model_that_is_named_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(f'{{"text": "{n} bottles of beer on the wall"}}\n' for n in range(300))
    )
    settings = [f"--set={part}.vocab_size=300" for part in ("data", "model")]
    words = ["data", "prepare", "--config", "pretrain/tiny.yaml", "--corpus", str(tmp_path / "text.jsonl")]
    monkeypatch.setattr("sys.argv", ["ictx", *words, "--out", str(tmp_path), "--set=data.min_bytes=1", *settings])
    assert main() == 0
    assert (Path(capsys.readouterr().out.split()[-1]) / "meta.json").exists()


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.idx", "tokenizer.json", "tokenizer_config.json"])
def test_a_single_bit_that_is_wrong_is_found(
    prepared: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(prepared.resolve(), tmp_path / "copy")
    monkeypatch.setattr("sys.argv", ["ictx", "data", "verify", str(folder)])
    assert main() == 0
    assert f"{folder} is intact" in capsys.readouterr().out
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ictx: {folder / name}: its SHA-256 is ")
    assert error.count("\n") == 1
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        verify(folder)


def test_a_log_gets_a_line_now_and_then_and_a_terminal_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 6))
    with monkeypatch.context() as patch:
        patch.setattr("ictx.data.progress.time.monotonic", lambda: next(clock))
        with Progress("copying", 8_000_000) as progress:
            for _ in range(4):
                progress.add(2_000_000)
    assert capsys.readouterr().out == "copying: 4 MB (50%), 0.2 MB/s\ncopying: 8 MB (100%), 0.2 MB/s\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("copying", 8_000_000) as progress:
        progress.add(8_000_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "copying: 100%" in captured.err
    assert "8.00M/8.00M" in captured.err


def test_a_run_that_is_told_to_stop_leaves_nothing(commands: Commands, tmp_path: Path, corpus: Path) -> None:
    arguments = ["data", "prepare", "--config", commands.folder / "test.yaml", "--corpus", corpus, "--out", tmp_path]
    process = commands.start(*arguments)
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    process.terminate()
    ended = commands.end(process)
    assert ended.status == 143, ended
    assert not list(tmp_path.iterdir())


PEAK = """
import resource, sys
from pathlib import Path
from ictx.data import encode
from ictx.data.config import DataConfig
from ictx.data.prepare import prepare
encode.BATCH = 1 << 17  # as on two cores: with many, a small corpus is not enough to fill the batches
prepare([sys.argv[1]], Path(sys.argv[2]), DataConfig(min_bytes=1, tokenizer=Path(sys.argv[3]), vocab_size=512))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_flat_however_large_the_corpus(tmp_path: Path, prepared: Path) -> None:
    """Thirteen times the text, with as many times the documents, needs no more memory beyond malloc's variance."""
    peaks = []
    for lines in (3_000, 40_000):
        source = tmp_path / f"{lines}.jsonl"
        words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
        with source.open("w") as file:
            for number in range(lines):
                text = " ".join(words[number >> place & 7] for place in range(16)) + f" {number}"
                file.write(json.dumps({"text": text * 8}) + "\n")
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out"), str(prepared)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(ended.stdout.split()[-1]) / 1024)
    size = (tmp_path / "40000.jsonl").stat().st_size / (1 << 20)
    assert size > 25
    assert peaks[1] - peaks[0] < size / 2, peaks


def test_the_seed_chooses_the_validation_documents(tmp_path: Path, corpus: Path, prepared: Path) -> None:
    config = dataclasses.replace(CONFIG, tokenizer=prepared)
    sets = [
        set(texts_of(prepare([corpus], tmp_path, dataclasses.replace(config, seed=seed)), "validation"))
        for seed in (0, 1)
    ]
    assert sets[0] != sets[1]
    assert all(Document.of(text).share("validation 1:") < CONFIG.validation_share for text in sets[1])
