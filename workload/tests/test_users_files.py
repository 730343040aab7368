"""Files from users, with any content, are read or rejected with one line that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Commands
from hypothesis import example, given
from hypothesis import strategies as st

from ictx.data.shards import files_of, read_meta
from ictx.errors import UserError
from ictx.track.mlflow import _run_id
from ictx.track.outbox import Outbox
from ictx.track.records import MetricsFile
from ictx.train.config import load

TEXT = st.text(st.characters(codec=None), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def encoded(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


RECORD = st.fixed_dictionaries({"step": st.integers() | JSON}, optional={"loss": JSON, "time": JSON})


@given(lines=st.lists(st.binary(max_size=30) | RECORD | JSON, max_size=6), end=st.sampled_from([b"", b"\n"]))
@example(lines=[b"[" * 100_000, {"step": 1}], end=b"\n")
@example(lines=[b"\0" * 100, {"step": 1, "loss": math.nan}, {"step": 10**400}], end=b"\n")
def test_records_of_any_content_are_taken_up(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any], end: bytes
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"\n".join(map(encoded, lines)) + end)
    metrics = MetricsFile(path, 10)
    metrics.append({"step": 11, "loss": 1.0})
    kept = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert kept[-1] == {"step": 11, "loss": 1.0}
    assert all(type(record["step"]) is int and record["step"] <= 11 for record in kept)
    for record in metrics.after(0):
        assert all(math.isfinite(value) for value in record.values())


class NoTracker:
    """A tracker that discards records."""

    def log(self, records: list[dict[str, float]]) -> None:
        """Discards the records."""


@given(note=st.binary(max_size=30) | st.integers().map(lambda number: str(number).encode()))
@example(note=b"")
@example(note=b"1" * 5000)
def test_notes_of_any_content_are_taken_up(tmp_path_factory: pytest.TempPathFactory, note: bytes) -> None:
    folder = tmp_path_factory.mktemp("notes")
    (folder / "mlflow_sent_step").write_bytes(note)
    metrics = MetricsFile(folder / "metrics.jsonl", 0)
    metrics.append({"step": 3, "time": 1.0})
    outbox = Outbox(NoTracker(), metrics, folder / "mlflow_sent_step", 3)  # type: ignore[arg-type]
    assert 0 <= outbox.sent <= 3
    outbox.send()
    (folder / "mlflow_run_id").write_bytes(note)
    assert _run_id(folder / "mlflow_run_id") in ("", note.decode(errors="replace").strip())


@pytest.fixture(scope="module")
def meta(prepared: Path) -> dict[str, Any]:
    """The content of meta.json."""
    return read_meta(prepared)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of all values in a nested value."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place, *(found for key, inner in items for found in places(inner, (*place, key)))]
    return [place]


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Returns a copy of a nested value with another value at a path."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


@given(data=st.data())
def test_any_description_of_data_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, meta: dict[str, Any], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("meta")
    place = data.draw(st.sampled_from(places(meta)))
    content = data.draw(st.binary(max_size=40) | JSON.map(lambda new: changed(meta, place, new)))
    (folder / "meta.json").write_bytes(encoded(content))
    try:
        files = files_of(read_meta(folder))
    except UserError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
    else:
        assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
        assert not [name for name in files if "/" in name]


YAML = st.sampled_from(
    [
        "2001-99-99",
        "!!timestamp x",
        "!!int ''",
        "!!bool x",
        "!!python/object/apply:os.system [true]",
        "&a [*a]",
        "1" * 5000,
        "0x" + "f" * 5000,
        ".nan",
        ".inf",
        "-1",
        "{? [a] : b}",
        "{1: 2}",
        "[" * 3000,
        '"\\ud800"',
        '"a\\0b"',
        "'a\n\nb'",
        "&a [&b [*a, *a], *b]",
        "!!binary x",
        "=",
        "<<: 1",
    ]
)
VALUES = YAML | JSON.map(json.dumps) | TEXT
NAMES = st.sampled_from(
    [
        "model",
        "model.moe",
        "model.yarn",
        "model.rope_theta",
        "model.q_lora_rank",
        "model.vocab_size",
        "data",
        "data.dir",
        "data.tokenizer",
        "data.trusted_owners",
        "data.trusted_dirs",
        "data.mix",
        "data.long_documents",
        "data.vocab_size",
        "run",
        "run.dir",
        "run.model_name",
        "train",
        "train.steps",
        "train.dtype",
        "train.mask_documents",
        "optimizer",
        "optimizer.learning_rate",
        "x.y",
    ]
)


@given(name=NAMES | TEXT, value=VALUES)
def test_any_setting_is_taken_or_refused_in_one_line(commands: Commands, name: str, value: str) -> None:
    try:
        load(str(commands.folder / "test.yaml"), [f"{name}={value}"])
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000


LINES = st.builds("{}: {}".format, NAMES, VALUES).map(lambda text: text.encode("utf-8", "replace"))


@given(content=st.binary(max_size=60) | LINES)
@example(content=b"model: tiny\ndata: null\ntrain:\nrun: []")
@example(content=b"model: tiny\nrun: 1")
def test_any_settings_file_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("settings") / "run.yaml"
    path.write_bytes(content)
    try:
        load(str(path), [])
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "", "/dev", "/nowhere/x.yaml"])
def test_a_settings_file_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="does not exist: set a path"):
        load(name, [])
