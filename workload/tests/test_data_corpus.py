"""Sources of documents: files that are read, their order, skipped files, and rejected sources."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ictx.data.config import DataConfig
from ictx.data.corpus import Corpus, Document, Seen
from ictx.data.skipped import Skipped
from ictx.errors import UserError

CONFIG = DataConfig(min_bytes=0)


def texts(*names: object, config: DataConfig = CONFIG) -> list[str]:
    return [document.text for document in Corpus([str(name) for name in names], config).documents()]


def write_table(path: Path, values: list[str | None], column: str = "text") -> Path:
    parquet.write_table(arrow.table({column: values, "number": list(range(len(values)))}), path, row_group_size=3)
    return path


def write_lines(path: Path, *records: object) -> Path:
    content = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with files of all kinds."""
    folder = tmp_path / "mixed"
    (folder / "below" / "__pycache__").mkdir(parents=True)
    (folder / "below" / "__pycache__" / "cached.txt").write_text("cached")
    (folder / "below" / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (folder / "packed.gz").write_bytes(gzip.compress("packed ünïcode 🎉\n".encode()))
    (folder / "broken.gz").write_bytes(b"\x1f\x8b not a gzip file")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "table.bin").write_bytes(b"text with \0 in it")
    (folder / "link.txt").symlink_to(folder / "zero.txt")
    (folder / "a.txt").write_text("plain")
    (folder / "again.txt").write_text("plain")
    (folder / "zero.txt").write_text("")
    (folder / "settings.json").write_text('{"text": "not a document of its own"}')
    write_lines(
        folder / "lines.jsonl", {"text": "line 1"}, {"text": "line 2", "more": 1}, {"text": "plain"}, {"text": ""}
    )
    write_lines(folder / "more.jsonl.gz", {"text": "gzipped line"})
    write_table(folder / "rows.parquet", ["row 1", None, "row 2", "line 1", "row 3"])
    write_table(folder / "numbers.parquet", ["x"], column="name")
    return folder


def test_everything_that_is_text_is_read_once_in_the_order_of_names(mixed: Path) -> None:
    assert texts(mixed) == [
        "plain",
        "one\r\ntwo\r\n",
        "line 1",
        "line 2",
        "gzipped line",
        "packed ünïcode 🎉\n",
        "row 1",
        "row 2",
        "row 3",
        '{"text": "not a document of its own"}',
    ]


def test_a_pass_counts_what_it_found(mixed: Path) -> None:
    found = Corpus([str(mixed)], CONFIG).scan()
    assert (found.documents, found.repeated) == (10, 3)
    assert found.bytes == sum(len(text.encode()) for text in texts(mixed))


def test_what_is_skipped_is_counted_and_named(mixed: Path) -> None:
    (mixed / "zz").symlink_to("nowhere")
    write_table(mixed / "more.parquet", [None, "x", None])
    for number in range(7):
        (mixed / f"y{number}").write_bytes(b"\xe9")
    assert sorted(Corpus([str(mixed)], CONFIG).scan().skipped) == [
        f"skipped 1 file (binary): {mixed}/table.bin",
        f"skipped 1 file (cannot be opened: No such file or directory): {mixed}/zz",
        f"skipped 1 file (damaged: Unknown compression method): {mixed}/broken.gz",
        f"skipped 1 file (no column 'text' of text (data.text_field)): {mixed}/numbers.parquet",
        f"skipped 1 folder (not documents): {mixed}/below/__pycache__",
        f"skipped 3 rows (without text): {mixed}/more.parquet, {mixed}/rows.parquet",
        f"skipped 8 files (not UTF-8): {mixed}/image.png, "
        + ", ".join(f"{mixed}/y{number}" for number in range(4))
        + " and 3 more",
    ]
    only = mixed / "only"
    only.mkdir()
    (only / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"is empty: it holds no text \(skipped 1 file \(not UTF-8\): .*/image.png\)"):
        texts(only)


def test_sources_that_overlap_are_read_once(mixed: Path) -> None:
    names = mixed / "below", mixed, mixed / "a.txt"
    assert sorted(texts(*names)) == sorted(texts(mixed))
    assert texts(*names) == texts(*reversed(names))


def test_the_fingerprint_follows_the_text_alone(mixed: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return Corpus([str(folder)], CONFIG).scan().fingerprint

    moved = shutil.copytree(mixed, tmp_path / "moved", symlinks=True)
    assert fingerprint(moved) == fingerprint(mixed)
    (moved / "zz.txt").write_text("plain")
    assert fingerprint(moved) == fingerprint(mixed), "the fingerprint does not depend on the location"
    (moved / "zz.txt").write_text("new")
    assert fingerprint(moved) != fingerprint(mixed)


@given(text=st.text(min_size=1, max_size=50), longest=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_long_documents_are_cut_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, text: str, longest: int
) -> None:
    folder = tmp_path_factory.mktemp("long")
    config = DataConfig(min_bytes=0, longest_document=longest)
    text = text.replace("\0", "0").replace("\ufeff", "0")
    (folder / "a.txt").write_text(text, newline="")
    found = [document.text for document, _ in Corpus([str(folder)], config)._all(Everything(), Skipped())]
    assert "".join(found) == text
    assert all(len(part) == longest for part in found[:-1])


class Everything:
    """A set of hashes that contains nothing."""

    def add(self, digest: bytes) -> bool:
        return True


def test_half_a_surrogate_pair_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n{"text": "c\\ud83d\\ude00"}\n')
    assert texts(tmp_path) == ["a? b", "c😀"]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_a_data_set_is_read_by_the_datasets_library(
    tmp_path: Path, layout: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, words in {"train": ["one", "two", "one"], "test": ["three"]}.items():
        if layout == "jsonl":
            write_lines(folder / f"{split}.jsonl", *({"body": word} for word in words))
        else:
            write_table(folder / f"{split}.parquet", list(words), "body")
    config = DataConfig(min_bytes=0, text_field="body", streaming=streaming)
    assert texts(f"hf={folder}", config=config) == ["one", "two"]
    assert texts(f"hf={folder},default,test", config=config) == ["three"]
    assert bool(list((tmp_path / "cache").rglob("*.arrow"))) is not streaming
    with pytest.raises(UserError, match=f"data set {folder} has no text in 'text' .*: it has body"):
        texts(f"hf={folder}", config=DataConfig(streaming=streaming))
    with pytest.raises(UserError, match=f"data set {folder} cannot be read: .*nosuchsplit"):
        texts(f"hf={folder},default,nosuchsplit", config=config)


def test_a_data_set_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="data set /no/such/folder cannot be read: "):
        texts("hf=/no/such/folder")
    with pytest.raises(UserError, match="corpus hf=a,b,c,d: expected hf=NAME"):
        texts("hf=a,b,c,d")


def test_files_that_were_asked_for_are_refused_by_name(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, {"body": "no text"})
    table = write_table(tmp_path / "a.parquet", ["x"], "body")
    broken = tmp_path / "b.parquet"
    broken.write_bytes(table.read_bytes()[:-20])
    cut = tmp_path / "c.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20])
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\xff\xfe")
    for path, message in {
        lines: "line 2 is not a JSON object with text in 'text'",
        table: "cannot be read as text: no column 'text' of text",
        broken: "is damaged: ",
        cut: "is damaged: ",
        image: "cannot be read as text: ",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            texts(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"{lines} line 2"):
        texts(tmp_path), "lines that are not read silently end a corpus early"


def test_hashes_are_told_apart_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    # The smallest cache that SQLite allows, so that most hashes are in the file.
    monkeypatch.setattr("ictx.data.corpus.CACHE_KIB", 1)
    seen, digests = Seen(), [Document.of(str(number)).digest for number in range(20_000)]
    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests)


def test_a_full_temporary_folder_is_named() -> None:
    seen = Seen()
    seen._database.execute("PRAGMA max_page_count = 4")
    with pytest.raises(UserError, match=r"temporary file \(TMPDIR\): database or disk is full"):
        for number in range(2000):
            seen.add(Document.of(str(number)).digest)


def test_a_share_is_even_and_follows_text_and_salt() -> None:
    documents = [Document.of(str(number)) for number in range(2000)]
    assert sum(document.share("a") for document in documents) / 2000 == pytest.approx(0.5, abs=0.03)
    assert [document.share("a") for document in documents[:9]] == [Document.of(str(n)).share("a") for n in range(9)]
    assert documents[0].share("a") != documents[0].share("b")
