"""Mixed corpora: shares are exact, nothing repeats within an epoch, and a resumed run continues exactly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Commands
from hypothesis import given, settings
from hypothesis import strategies as st

from ictx.data.config import DataConfig
from ictx.data.loader import Batches
from ictx.data.mix import LEAST_BLOCK, Mix, Schedule, opened
from ictx.data.shards import SPLITS, TokenArray
from ictx.data.stream import Stream
from ictx.errors import UserError
from ictx.settings import build

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)
SEED = st.integers(0, 2**64 - 1)


def write(folder: Path, documents: Sequence[int], first: int, tokenizer: str = "a") -> Path:
    """Writes prepared data of consecutive tokens from `first` on, in documents of these lengths."""
    folder.mkdir()
    meta: dict[str, Any] = {
        "format": 2,
        "fingerprint": folder.name,
        "dtype": "<u4",
        "vocab_size": 1 << 20,
        "sha256": {"tokenizer.json": tokenizer * 64, "tokenizer_config.json": "b" * 64},
        "end_of_text": [0, "<|endoftext|>"],
        "unigram_entropy": float(first),
        "splits": {},
    }
    for split in SPLITS:
        name, total = f"{split}-00000", sum(documents)
        np.arange(first, first + total, dtype="<u4").tofile(folder / f"{name}.bin")
        np.cumsum(documents).astype("<i8").tofile(folder / f"{name}.idx")
        sums = {f"{name}.{kind}": "c" * 64 for kind in ("bin", "idx")}
        meta["splits"][split] = [{"name": name, "tokens": total, "documents": len(documents), "sha256": sums}]
        meta[f"{split}_tokens"] = total
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A large corpus of short documents, and a small one that also has long documents."""
    return [write(tmp_path / "web", [10] * 400, 0), write(tmp_path / "books", [5] * 60 + [100] * 3, 10_000)]


def config(**values: Any) -> DataConfig:
    return build(DataConfig, values)


def mixed(folders: list[Path], weights: Sequence[float], split: Any = "train", **values: Any) -> TokenArray | Mix:
    corpora = [{"dir": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    return opened(folders, config(mix=corpora, **values), split)


@given(weights=WEIGHTS, seed=SEED, blocks=st.integers(1, 5))
@settings(deadline=None)
def test_shares_are_exact_and_every_window_comes_once(weights: list[float], seed: int, blocks: int) -> None:
    schedule = Schedule(weights, seed)
    taken = [schedule(number) for number in range(blocks * schedule.block)]
    for source, weight in enumerate(weights):
        own = [number for which, number in taken if which == source]
        assert own == list(range(len(own))), "in the order of the corpus, each once"
        assert abs(len(own) - len(taken) * weight / sum(weights)) <= 1
    assert [schedule(number) for number in (7, len(taken) - 1, 0)] == [taken[7], taken[-1], taken[0]]
    if len(weights) > 1 and min(weights) > 0.2 * sum(weights):
        half = Counter(which for which, _ in taken[: schedule.block // 2])
        assert len(half) == len(weights), "sources are distributed over a block"


def test_a_share_that_no_block_holds_is_refused() -> None:
    with pytest.raises(UserError, match=r"a corpus has 1.0e-09 of all weights: expected at least 1.9e-06"):
        Schedule([1.0, 1e-9], 0)


def windows(data: TokenArray | Mix, count: int, ranks: int = 1, state: dict[str, int] | None = None) -> list[list[int]]:
    """Returns the inputs of the next windows, read by this number of ranks."""
    loaders = [Batches(data, 10, 2, rank, ranks, 5) for rank in range(ranks)]
    for loader in loaders:
        loader.load_state_dict(state or loader.state_dict())
    rows: list[list[int]] = []
    while len(rows) < count:
        rows += torch.cat([loader.next().input_ids for loader in loaders]).tolist()
    return rows[:count]


def test_corpora_come_in_their_shares_and_each_epoch_is_whole(folders: list[Path]) -> None:
    data, count = mixed(folders, [3, 1]), 8 * LEAST_BLOCK
    rows = windows(data, count)
    books = [row for row in rows if row[0] >= 10_000]
    assert len(books) == count / 4
    # 600 tokens per epoch: the books are read eight times while the web is read less than four times.
    for epoch in range(8):
        tokens = [token for row in books for token in row][epoch * 600 : (epoch + 1) * 600]
        assert sorted(tokens) == list(range(10_000, 10_600)), epoch
    alone = Stream(TokenArray.open(folders[1], "train"), 10, 5)
    assert books == [alone.window(number)[0][:-1].tolist() for number in range(len(books))]
    assert windows(mixed(folders, [6, 2]), count) == rows, "only the ratio of the weights matters"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_mix_is_the_uninterrupted_one(folders: list[Path], ranks: int) -> None:
    data = mixed(folders, [0.2, 0.8], long_documents={"tokens": 50, "weight": 3})
    whole = windows(data, 400)
    for stop in (8, 256, 264):
        state = {"taken": stop, "length": 10, "seed": 5}
        assert windows(data, 400 - stop, ranks, state) == whole[stop:]


def test_long_documents_are_read_more_often(folders: list[Path]) -> None:
    books = folders[1]
    data = opened([books], config(dir=str(books), long_documents={"tokens": 100, "weight": 4}), "train")
    # Half of the tokens are in long documents, which are therefore four fifths of the windows.
    rows = windows(data, 5 * LEAST_BLOCK)
    long = [row for row in rows if row[0] >= 10_300]
    assert len(long) == 4 * LEAST_BLOCK
    for part, tokens in (
        (long, range(10_300, 10_600)),
        ([row for row in rows if row not in long], range(10_000, 10_300)),
    ):
        flat = [token for row in part for token in row]
        for epoch in range(len(flat) // 300):
            assert sorted(flat[epoch * 300 : (epoch + 1) * 300]) == list(tokens)
    plain = opened([books], config(dir=str(books)), "train")
    assert isinstance(plain, TokenArray)
    assert len(opened([books], config(dir=str(books), long_documents={"tokens": 2, "weight": 4}), "train").arrays) == 1


def test_validation_has_the_shares_too(folders: list[Path]) -> None:
    data = mixed(folders, [1, 3], "validation", long_documents={"tokens": 50, "weight": 3})
    count = data.windows(10)
    assert count == 78, "the books have 59 windows"
    found = [tuple(data.window(number, 10)[0].tolist()) for number in range(count)]
    assert len(set(found)) == count
    assert sum(window[0] >= 10_000 for window in found) == pytest.approx(count * 3 / 4, abs=1)
    assert data.meta["unigram_entropy"] == 7_500


def test_another_mix_is_other_data(folders: list[Path]) -> None:
    several = [
        mixed(folders, [1, 3]),
        mixed(folders, [1, 4]),
        mixed(folders, [1, 3], long_documents={"tokens": 50, "weight": 3}),
        mixed(folders, [1, 3], long_documents={"tokens": 50, "weight": 2}),
        opened(folders[:1], config(dir=str(folders[0])), "train"),
    ]
    assert len({data.meta["fingerprint"] for data in several}) == len(several)
    assert several[-1].meta["fingerprint"] == "web", "a single corpus keeps its fingerprint, as in earlier releases"
    assert mixed(folders, [2, 6]).meta["fingerprint"] == several[0].meta["fingerprint"]


def test_corpora_that_cannot_be_mixed_are_named(folders: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other", [10], 0, tokenizer="d")
    with pytest.raises(UserError, match=f"{other} has another tokenizer than {folders[0]}: prepare it with data.token"):
        mixed([*folders, other], [1, 1, 1])
    with pytest.raises(UserError, match=f"{folders[0]} is the same corpus as {folders[0]}: list it once"):
        mixed([folders[0], folders[0]], [1, 1])
    tiny = write(tmp_path / "tiny", [10], 0)
    with pytest.raises(UserError, match=f"{tiny} has no window of 10 tokens"):
        windows(mixed([folders[0], tiny], [1, 1]), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mix": [{"dir": "a", "weight": 0}]}, r"mix\[0\].weight is 0.0: expected more than 0"),
        ({"mix": [{"dir": "a"}, {"dir": "b", "weight": "x"}]}, r"setting mix\[1\].weight is 'x': expected float"),
        ({"mix": [{"folder": "a"}]}, r"unknown setting mix\[0\].folder"),
        ({"mix": {"dir": "a"}}, r"setting mix is .*: expected a list"),
        ({"long_documents": {"tokens": 5}}, r"missing setting long_documents.weight"),
        ({"long_documents": {"tokens": 1, "weight": 2}}, r"long_documents.tokens is 1: expected more than 1"),
        ({}, r"data.dir is not set"),
        ({"mix": [{"weight": 2}, {"dir": "b"}]}, r"data.dir is not set"),
        ({"mix": [{"dir": "a"}], "dir": "b"}, r"data.dir is set, but each corpus of data.mix has a dir"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = config(**values).dirs


def test_the_job_s_own_corpus_is_one_of_a_mix() -> None:
    own = config(dir="run/data", mix=[{"weight": 3}, {"dir": "books"}])
    assert own.dirs == [Path("run/data"), Path("books")]
    assert own.weights == [3.0, 1.0]


@pytest.mark.full
def test_a_run_on_a_mix_goes_on_where_it_stopped(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    other = tmp_path / "corpus"
    other.mkdir()
    for number in range(40):
        (other / f"{number}.txt").write_text(f"document {number} has words of its own. " * 100)
    arguments = ["--config", commands.folder / "test.yaml", "--corpus", other, "--out", tmp_path / "data"]
    ended = commands.run(
        "data", "prepare", *arguments, f"--set=data.tokenizer={prepared}", "--set=data.validation_share=0.5"
    )
    assert ended.status == 0, ended.err
    mix = f"data.mix=[{{weight: 3}}, {{dir: {ended.out.split()[-1]}}}]"
    results = {}
    for name, stops in {"whole": [6], "halves": [3, 6]}.items():
        for steps in stops:
            wanted = [mix, f"train.steps={steps}", "train.checkpoint_every=1", "optimizer.final_share=0.9999"]
            ended = commands.run(*commands.pretrain(tmp_path / name, prepared, *wanted, "optimizer.warmup_steps=0"))
            assert ended.status == 0, ended.err
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert results["halves"]["resumed_from_step"] == 3
    assert results["halves"]["final_loss"] == pytest.approx(results["whole"]["final_loss"], abs=1e-3)
    wanted = [mix.replace("weight: 3", "weight: 2"), "train.steps=7"]
    ended = commands.run(*commands.pretrain(tmp_path / "whole", prepared, *wanted))
    assert ended.status == 2
    assert "was trained on other data than" in ended.err
