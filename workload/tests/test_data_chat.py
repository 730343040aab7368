"""Conversations and preferences: all supported formats become one, and an invalid row is reported with its location."""

from __future__ import annotations

import ast
import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import Commands

from ictx.cli import main
from ictx.data.chat import stdlib
from ictx.data.chat.config import ChatDataConfig
from ictx.data.chat.files import read_meta, read_rows
from ictx.data.chat.forms import dpo_row, sft_row
from ictx.data.chat.prepare import prepare
from ictx.data.contents import verify
from ictx.data.shards import TokenArray
from ictx.errors import UserError

SFT, DPO = ChatDataConfig("sft", validation_share=0.5), ChatDataConfig("dpo", validation_share=0.5)
ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}
OTHER = {"role": "assistant", "content": "No."}


def rows_of(directory: Path) -> list[Any]:
    return [row for split in ("train", "validation") for row in read_rows(directory, split)]  # type: ignore[arg-type]


def chat(number: int, answer: str = "answer") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Question {number}"},
            {"role": "assistant", "content": f"{answer} {number}"},
        ]
    }


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, ASK, ANSWER]}, [SYSTEM, ASK, ANSWER]),
        ({"messages": [ASK | {"name": "x"}, ANSWER]}, [ASK, ANSWER]),
        ({"messages": [ASK | {"content": [{"type": "text", "text": "Why?"}]}, ANSWER]}, [ASK, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, [ASK, ANSWER]),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
            },
            [SYSTEM, ASK, ANSWER],
        ),
        ({"conversations": [ASK, ANSWER]}, [ASK, ANSWER]),
        ({"instruction": "Why?", "input": "", "output": "So."}, [ASK, ANSWER]),
        ({"instruction": "Why?", "input": "It is.", "output": "So."}, [ASK | {"content": "Why?\nIt is."}, ANSWER]),
        ({"prompt": "Why?", "completion": "So."}, [ASK, ANSWER]),
        ({"prompt": [SYSTEM, ASK], "completion": [ANSWER]}, [SYSTEM, ASK, ANSWER]),
        (
            {"messages": [ASK, ANSWER, {"role": "tool", "content": "4"}, OTHER, ASK, ANSWER]},
            [ASK, ANSWER, {"role": "tool", "content": "4"}, OTHER, ASK, ANSWER],
        ),
    ],
)
def test_forms_of_conversations(record: Any, messages: Any) -> None:
    assert sft_row(record) == {"messages": messages}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Why?", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
    ],
)
def test_forms_of_preferences_are_those_of_trl(record: Any) -> None:
    assert dpo_row(record) == {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]}


def test_earlier_turns_are_of_the_prompt() -> None:
    record = {"system": "Be brief.", "chosen": [ASK, ANSWER, ASK, ANSWER], "rejected": [ASK, ANSWER, ASK, OTHER]}
    assert dpo_row(record) == {"prompt": [SYSTEM, ASK, ANSWER, ASK], "chosen": [ANSWER], "rejected": [OTHER]}


BAD = [
    (SFT, b'{"text": "x"}', r"no messages: expected messages, conversations \(ShareGPT\).*; it has text"),
    (SFT, b'{"messages": []}', r"no messages: messages is \[\], expected a list"),
    (
        SFT,
        b'{"messages": [{"role": "robot", "content": "x"}]}',
        r"unknown role: messages\[0\] has the role robot, expected system",
    ),
    (SFT, b'{"messages": [{"content": "x"}]}', r"unknown role: messages\[0\] has the role None"),
    (SFT, b'{"messages": [3]}', r"no messages: messages\[0\] is 3"),
    (SFT, b'{"messages": [{"role": "user", "content": 3}]}', r"no text: messages\[0\]\.content is 3"),
    (SFT, b'{"instruction": "a", "output": " \\n"}', "empty answer: message 2 has no content"),
    (SFT, b'{"instruction": "", "output": "b"}', "empty question"),
    (SFT, b'{"prompt": " ", "completion": "b"}', "empty question: message 1"),
    (SFT, json.dumps({"messages": [ASK, ASK, ANSWER]}).encode(), "wrong order of roles: message 2 has the role user"),
    (
        SFT,
        json.dumps({"messages": [ANSWER]}).encode(),
        "message 1 has the role assistant, expected system or user first",
    ),
    (
        SFT,
        json.dumps({"messages": [ASK, SYSTEM]}).encode(),
        "message 2 has the role system, expected assistant after user",
    ),
    (SFT, json.dumps({"messages": [ASK]}).encode(), "the last message has the role user, expected assistant"),
    (SFT, json.dumps({"messages": [ASK, ANSWER | {"tool_calls": [1]}]}).encode(), "tool calls"),
    (SFT, b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
    (SFT, b'{"prompt": "\\ud800", "completion": "b"}', "not UTF-8: prompt holds half of a surrogate pair"),
    (SFT, b"[1]", "no JSON object"),
    (SFT, b'{"prompt": ', "no JSON: "),
    (DPO, b'{"prompt": "a", "chosen": "b"}', "no chosen and rejected: it has prompt, chosen"),
    (DPO, b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same"),
    (DPO, b'{"chosen": "b", "rejected": "c"}', "no prompt: expected"),
    (DPO, b'{"prompt": "a", "chosen": "b", "rejected": ""}', "empty answer: rejected: message 2 has no content"),
    (DPO, json.dumps({"chosen": [ASK, ANSWER], "rejected": [ASK]}).encode(), "empty answer: rejected has no message"),
    (
        DPO,
        json.dumps({"prompt": [ASK, ANSWER], "chosen": "b", "rejected": "c"}).encode(),
        "wrong order of roles: chosen: ",
    ),
]


@pytest.mark.parametrize(("config", "line", "message"), BAD)
def test_a_bad_row_is_named_with_its_place(tmp_path: Path, config: ChatDataConfig, line: bytes, message: str) -> None:
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl line 3: .*{message}.*\(data\.bad_rows=drop") as raised:
        prepare([file], tmp_path / "out", config)
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)
    assert not [*(tmp_path / "out").iterdir()]


def test_bad_and_long_rows_are_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(number) for number in range(40)]
    file = write_lines(
        tmp_path / "rows.jsonl", [*rows, {"text": 1}, {"text": 2}, chat(1, "x" * 5000), {"messages": [ASK]}]
    )
    directory = prepare([file], tmp_path, dataclasses.replace(SFT, bad_rows="drop", longest_row=1000))
    out = capsys.readouterr().out
    assert f"skipped 2 rows (no messages): {file} line 41, {file} line 42" in out
    assert f"skipped 1 row (longer than data.longest_row, 1,000): {file} line 43" in out
    assert f"skipped 1 row (wrong order of roles): {file} line 44" in out
    assert len(rows_of(directory)) == 40
    assert sum(read_meta(directory)["skipped"].values()) == 4


def test_rows_come_from_files_of_all_kinds(tmp_path: Path) -> None:
    """Compressed JSON lines, a JSON list, a table, and a data set of `datasets` give the same rows."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(chat(n)) + "\n" for n in range(10)).encode()))
    (folder / "b.json").write_text(json.dumps([chat(number) for number in range(10, 20)], indent=1))
    table = pyarrow.Table.from_pylist([chat(number) | {"conversations": None} for number in range(20, 30)])
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    (folder / "README.md").write_text("No rows.")
    whole = write_lines(tmp_path / "whole.jsonl", [chat(number) for number in range(30)])
    (tmp_path / "hub").mkdir()
    write_lines(tmp_path / "hub" / "train.jsonl", [chat(number) for number in range(30)])
    found = {prepare([source], tmp_path / "out", SFT) for source in (folder, whole, f"hf={tmp_path}/hub")}
    assert len(found) == 1, "the name depends only on the rows"
    assert sorted(map(json.dumps, rows_of(found.pop()))) == sorted(json.dumps(chat(number)) for number in range(30))


def test_rows_come_through_a_pipe(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("data: {kind: sft, validation_share: 0.5}")
    os.mkfifo(tmp_path / "pipe")
    words = ["data", "prepare", "--config", tmp_path / "sft.yaml", "--corpus", tmp_path / "pipe", "--out", tmp_path]
    for rows, status in (([chat(number) for number in range(20)], 0), ([chat(0), {}], 2)):
        started = commands.start(*words)
        write_lines(tmp_path / "pipe", rows)
        ended = commands.end(started)
        assert ended.status == status, ended.err
    assert f"corpus pipe {tmp_path}/pipe line 2: no messages" in ended.err


def test_a_row_of_a_table_that_is_not_utf_8_does_not_cost_the_others(tmp_path: Path) -> None:
    prompts = pyarrow.array([b"a", b"\xff", b"c", b"d", b"e", b"f"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": prompts, "completion": ["1", "2", "3", "4", "5", "6"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet row 2: not UTF-8"):
        prepare([tmp_path / "rows.parquet"], tmp_path, SFT)
    assert len(rows_of(prepare([tmp_path / "rows.parquet"], tmp_path, dataclasses.replace(SFT, bad_rows="drop")))) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[1, ", "is not a JSON list"),
        ("rows.json", b'["\xff"]', "is not UTF-8, from byte 2 on"),
        ("rows.jsonl", b"", "is empty: it holds no rows"),
        ("rows.jsonl.gz", gzip.compress(b"{}" * 99)[:-12], "is damaged"),
        ("rows.parquet", b"PAR1 and no more", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} {message}"):
        prepare([tmp_path / name], tmp_path / "out", SFT)


def test_a_prompt_stays_in_its_split_whatever_its_answers_are(tmp_path: Path) -> None:
    """Also across kinds of data: DPO does not train on prompts that validate SFT."""
    few = write_lines(tmp_path / "few.jsonl", [chat(number) for number in range(60)])
    more = write_lines(tmp_path / "more.jsonl", [chat(number % 90, answer) for answer in "ab" for number in range(99)])
    pairs = [{"prompt": f"Question {n}", "chosen": "a", "rejected": "b"} for n in range(60)]

    def prompts(split: Any, directory: Path) -> set[str]:
        rows = read_rows(directory, split)
        return {(row.get("prompt") or row["messages"])[0]["content"] for row in rows}

    first, second = prepare([few], tmp_path, SFT), prepare([few, more], tmp_path, SFT)
    third = prepare([write_lines(tmp_path / "pairs.jsonl", pairs)], tmp_path, DPO)
    for split in ("train", "validation"):
        assert prompts(split, first) == prompts(split, third) <= prompts(split, second)
    assert not prompts("train", second) & prompts("validation", second)
    assert len({first.name, second.name, third.name}) == 3


def test_the_same_rows_are_prepared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [chat(number) for number in range(30)] * 2)
    directory = prepare([file], tmp_path / "out", SFT)
    assert "(30 duplicates)" in capsys.readouterr().out
    assert prepare([file], tmp_path / "out", SFT) == directory
    assert "holds this corpus already" in capsys.readouterr().out
    assert prepare([file], tmp_path / "out", dataclasses.replace(SFT, seed=1)) != directory
    assert verify(directory)["splits"]["train"]["rows"] + verify(directory)["splits"]["validation"]["rows"] == 30
    assert main_status(["data", "verify", str(directory)]) == 0
    content = (directory / "train.jsonl").read_bytes()
    (directory / "train.jsonl").write_bytes(content.replace(b"answer", b"poison"))
    again = prepare([file], tmp_path / "out", SFT)
    assert again != directory and (again / "train.jsonl").read_bytes() == content
    assert "train.jsonl: its SHA-256 is" in capsys.readouterr().out


def main_status(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ictx", *words])
        return main()


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 usable rows are too few for a validation share of"):
        prepare([write_lines(tmp_path / "rows.jsonl", [chat(1)])], tmp_path / "out", SFT)


def meta(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / "meta.json").read_text())
        change(content)
        (directory / "meta.json").write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "meta.json").unlink(), "holds no prepared data"),
        (meta(lambda m: m.update(kind="poems")), "holds poems data, not sft"),
        (meta(lambda m: m.update(format=9)), "has format 9"),
        (meta(lambda m: m["splits"].pop("train")), "is invalid for FORMAT=1"),
        (meta(lambda m: m["splits"]["train"].update(rows=-1)), "is invalid for FORMAT=1"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    directory = prepare([write_lines(tmp_path / "rows.jsonl", [chat(n) for n in range(30)])], tmp_path / "out", SFT)
    with pytest.raises(UserError, match="holds sft data, not dpo"):
        read_meta(directory, "dpo")
    with pytest.raises(UserError, match="holds sft data, not tokens of a corpus"):
        TokenArray.open(directory, "train")
    damage(directory)
    with pytest.raises(UserError, match=message):
        read_meta(directory, "sft")


def test_functions_of_the_standard_library_and_their_docstrings(tmp_path: Path) -> None:
    directory = prepare(["stdlib"], tmp_path, ChatDataConfig("sft"))
    rows = rows_of(directory)
    assert len(rows) > 3000
    (row,) = [row for row in rows if "def commonprefix(m)" in row["messages"][0]["content"]]
    assert row["messages"][1]["content"] == "Given a list of pathnames, returns the longest common leading component"
    for row in rows[:500]:
        question, answer = (message["content"] for message in row["messages"])
        source = question.removeprefix("Document this function:\n\n```python\n").removesuffix("\n```")
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None or answer not in source


def test_rejected_docstrings_are_of_other_functions_or_cut() -> None:
    chosen, kinds = {docstring for _, _, docstring in stdlib.documented()}, {"cut": 0, "other": 0}
    for _, record in stdlib.records("dpo"):
        row = dpo_row(record)
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert wrong != right
        kinds["other" if wrong in chosen and not right.startswith(wrong) else "cut"] += 1
        assert wrong in chosen or right.startswith(wrong)
    assert min(kinds.values()) > 1000
    assert list(stdlib.records("dpo")) == list(stdlib.records("dpo"))
