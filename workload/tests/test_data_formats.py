"""Supported files of a corpus: compressed, linked, piped, with byte order marks and blank lines."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from conftest import Commands
from hypothesis import example, given
from hypothesis import strategies as st

from ictx.data.config import DataConfig
from ictx.data.corpus import Corpus
from ictx.errors import UserError

CONFIG = DataConfig(min_bytes=0)
RECORDS = b'{"text": "one"}\n{"text": "two"}\n'


def texts(*names: object) -> list[str]:
    return [document.text for document in Corpus([str(name) for name in names], CONFIG).documents()]


def skipped(*names: object) -> list[str]:
    return list(Corpus([str(name) for name in names], CONFIG).scan().skipped)


def zstd(content: bytes) -> bytes:
    return bytes(arrow.compress(content, codec="zstd", asbytes=True))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_whatever_they_are_called(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSORS[suffix]
    (tmp_path / f"a.JSONL{suffix.upper()}").write_bytes(compress(b'{"text": "a"}\n') + compress(b'{"text": "b"}\n'))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("grün\r\n".encode()))
    (tmp_path / "blob").write_bytes(compress(RECORDS))
    (tmp_path / "plain").write_bytes(b"plain")
    assert texts(tmp_path) == ["a", "b", "grün\r\n", "one", "two", "plain"]
    (tmp_path / f"c.txt{suffix}").write_bytes(compress(os.urandom(999).hex().encode())[:-20])
    assert texts(tmp_path) == ["a", "b", "grün\r\n", "one", "two", "plain"]
    [line] = skipped(tmp_path)
    assert line.startswith("skipped 1 file (damaged: ")
    assert line.endswith(f": {tmp_path}/c.txt{suffix}")


def test_json_lines_are_read_with_marks_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n  \r\n" + RECORDS + b'\n\xef\xbb\xbf{"text": "three"}\n\n')
    (tmp_path / "b.NDJSON").write_bytes(b"\xef\xbb\xbf" + b'{"text": "four"}')
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbffive")
    assert texts(tmp_path) == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (b'{"text": null}', 1),
        (b'\n\n{"body": "other"}', 3),
        (RECORDS + b"[1]", 3),
        (RECORDS + b'{"text": 1}', 3),
        (RECORDS + b"not JSON", 3),
        (b"[" * 100_000, 1),
        (b'{"text": ' * 100_000, 1),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz"])
def test_a_line_without_text_is_named_also_below_a_folder(tmp_path: Path, name: str, line: bytes, number: int) -> None:
    (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UserError) as error:
            texts(source)
        assert str(error.value) == (
            f"{tmp_path / name} line {number} is not a JSON object with text in 'text' (data.text_field)"
        )


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    """As in the Hugging Face cache, where names are links to blobs without a suffix."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0a1b").write_bytes(gzip.compress(RECORDS))
    (snapshot / "a.jsonl.gz").symlink_to("../../blobs/0a1b")
    (snapshot / "below").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("three")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "hub")
    (snapshot / "self").symlink_to("self")
    assert texts(snapshot) == texts(tmp_path / "hub") == ["one", "two", "three"]
    assert skipped(snapshot) == [
        f"skipped 1 file (cannot be opened: Too many levels of symbolic links): {snapshot}/self"
    ]


@pytest.mark.parametrize(
    "kind",
    [arrow.string(), arrow.large_string(), arrow.string_view(), arrow.dictionary(arrow.int32(), arrow.string())],
    ids=str,
)
def test_columns_of_text_of_any_kind_are_read(tmp_path: Path, kind: arrow.DataType) -> None:
    column = arrow.array(["one", None, "two", "", "three"])
    column = column.dictionary_encode() if arrow.types.is_dictionary(kind) else column.cast(kind)
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.PARQUET")
    (tmp_path / "blob").write_bytes((tmp_path / "a.PARQUET").read_bytes())
    assert parquet.read_schema(tmp_path / "a.PARQUET").field("text").type == kind
    assert texts(tmp_path) == ["one", "two", "three"]
    assert skipped(tmp_path / "blob") == [f"skipped 2 rows (without text): {tmp_path}/blob"]


def test_a_string_that_is_not_utf_8_costs_no_other_rows(tmp_path: Path) -> None:
    values = [f"row {number}".encode() if number != 64 else b"\xff" for number in range(121)]
    column = arrow.array(values, arrow.binary())
    column = arrow.Array.from_buffers(arrow.string(), len(column), column.buffers())
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=50)
    assert texts(tmp_path) == [f"row {number}" for number in range(121) if number != 64]
    assert skipped(tmp_path) == [f"skipped 1 row (not UTF-8): {tmp_path}/a.parquet"]


def test_a_pipe_is_read_as_often_as_it_takes(commands: Commands, corpus: Path, tmp_path: Path) -> None:
    lines = (json.dumps({"text": file.read_text()}) for file in sorted(corpus.glob("*.py")))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    command = (
        f"{sys.executable} -m ictx data prepare --config {commands.folder}/test.yaml --out {tmp_path}/out "
        f"--corpus <(zcat {tmp_path}/a.jsonl.gz)"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    piped = Path(done.stdout.split()[-1])
    config = commands.folder / "test.yaml"
    ended = commands.run(
        "data", "prepare", "--config", config, "--corpus", tmp_path / "a.jsonl.gz", "--out", piped.parent
    )
    assert "nothing to do" in ended.out, "the documents are the same"
    done = subprocess.run(
        ["bash", "-c", f"{command} --set data.text_field=body"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ictx: corpus pipe /dev/fd/")
    assert "line 1 is not a JSON object with text in 'body'" in done.stderr


def test_names_that_are_not_utf_8_are_read_and_printed(commands: Commands, corpus: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.txt").write_text("".join(file.read_text() for file in sorted(corpus.glob("*.py"))))
    (folder / "b.txt").write_text("some more text")
    arguments = ["--config", commands.folder / "test.yaml", "--corpus", folder, "--out", tmp_path / "out"]
    ended = commands.run("data", "prepare", *arguments, "--set=data.validation_share=0.5", "--set=data.seed=3")
    assert "Traceback" not in ended.err
    assert f"reading {tmp_path}/caf\\udce9" in ended.out
    with pytest.raises(UserError, match=r"corpus path .*/caf.*/no does not exist"):
        texts(folder / "no")


@pytest.mark.parametrize("name", ["/dev/null", "a\0b", "a" * 5000])
def test_what_is_no_source_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"corpus path .* (is not a file, folder or pipe|cannot be read: )"):
        texts(name)


LINES = st.lists(
    st.sampled_from([b'{"text": "x"}', b"{}", b"", b" ", b"\xef\xbb\xbf", b"\xff", b"[1]", b'{"text": null}', b"\0"])
)


@given(
    name=st.sampled_from(["a", "a.txt", "a.jsonl", "a.Ndjson.GZ", "a.parquet", "a.zst", "a.txt.bz2", "a.gz"]),
    content=st.binary(max_size=60) | LINES.map(b"\n".join),
    compress=st.sampled_from([bytes, *COMPRESSORS.values()]),
    end=st.integers(0, 200),
)
@example(name="a", content=b"PAR1", compress=bytes, end=200)
@example(name="a.zst", content=b"\x28\xb5\x2f\xfd", compress=bytes, end=200)
def test_any_file_is_read_skipped_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    content: bytes,
    compress: Callable[[bytes], bytes],
    end: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(compress(content)[:end])
    (folder / "z.txt").write_text("more")
    for source in (folder, folder / name):
        try:
            corpus = Corpus([str(source)], CONFIG)
            found = corpus.scan()
            assert len(list(corpus.documents())) == found.documents
            for line in found.skipped:
                assert str(folder / name) in line
                assert "\n" not in line
        except UserError as error:
            assert str(folder / name) in str(error)
            assert "\n" not in str(error)
