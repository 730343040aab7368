"""RULER's tasks: the text has the requested length, and contains the answers the right number of times."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from endpoint import Server, serving, text
from evaluated import export, ictx
from hypothesis import given
from hypothesis import strategies as st
from models import YARN

from ictx.errors import UserError
from ictx.evaluate.needle import haystack_text
from ictx.evaluate.ruler import words
from ictx.evaluate.ruler.needles import NOISE
from ictx.evaluate.ruler.questions import local, read
from ictx.evaluate.ruler.task import Task, largest
from ictx.evaluate.ruler.tasks import NAMES, NEEDLES, Essay, Prompts, tasks
from ictx.infer.vocabulary import Vocabulary

ESSAY = Essay(haystack_text(None))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("ruler") / "model", yarn=YARN, max_position_embeddings=256)


@pytest.fixture(scope="module")
def all_tasks() -> dict[str, Task]:
    return tasks(*local())


@pytest.fixture(scope="module")
def prompts(checkpoint: Path, all_tasks: dict[str, Task]) -> Prompts:
    return Prompts(all_tasks, ESSAY, Vocabulary.load(checkpoint), chat=False, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_as_long_as_asked_and_holds_its_answers(prompts: Prompts, name: str) -> None:
    for length in (12_000, 30_000):
        size = prompts.size(name, length)
        task = prompts.tasks[name]
        for number in range(3):
            tokens, question = prompts.fitting(name, length, number, size)
            assert 0.8 * length < len(tokens) + task.new_tokens <= length
            assert all(answer in question.prompt for answer in question.answers)
            assert task.score(f"It is {' or '.join(question.answers)}.".upper(), question.answers) == 1
            assert task.score("nothing", question.answers) == 0
        assert prompts.fitting(name, length, 0, size)[0] == prompts.fitting(name, length, 0, size)[0]
        assert prompts.fitting(name, length, 0, size)[0] != prompts.fitting(name, length, 1, size)[0]


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_as_many_as_the_variant_has(name: str) -> None:
    variant = NEEDLES[name]
    question = variant(Random(3), ESSAY, 50)
    needles = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", question.prompt)
    surround = 50 if variant.haystack == "needle" else 0
    keys = max(variant.keys, variant.queries)
    assert len(needles) == keys * variant.values + surround
    by_key = Counter(key for _, key, _ in needles)
    assert len(by_key) == keys + surround and set(by_key.values()) <= {variant.values, 1}
    asked = {key for _, key, value in needles if value in question.answers}
    assert len(asked) == variant.queries and all(key in question.prefix for key in asked)
    assert len(question.answers) == variant.queries * variant.values
    assert question.prompt.count(NOISE) == (50 if variant.haystack == "noise" else 0)


def test_variables_are_a_chain_in_the_order_of_the_text(all_tasks: dict[str, Task]) -> None:
    question = all_tasks["vt"].build(Random(1), ESSAY, 40)
    text = question.prompt.rpartition("Memorize and track")[2]
    steps = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    assert [name for name, _ in steps] == question.answers and len(steps) == 5
    assert [value for _, value in steps[1:]] == question.answers[:-1]
    assert f"value {steps[0][1]}" in text and steps[0][1].isdecimal()


def test_common_words_are_the_most_common(all_tasks: dict[str, Task]) -> None:
    question = all_tasks["cwe"].build(Random(1), ESSAY, 60)
    text = question.prompt.rpartition("Below is a numbered list")[2]
    counts = Counter(re.findall(r"\d+\. (\S+)", text))
    assert {word for word, _ in counts.most_common(10)} == set(question.answers)
    assert sorted(counts.values()) == [3] * 50 + [30] * 10


def test_frequent_words_follow_the_zeta_distribution(all_tasks: dict[str, Task]) -> None:
    question = all_tasks["fwe"].build(Random(1), ESSAY, 5000)
    counts = Counter(re.findall(r"\b[a-z]{6}\b", question.prompt.partition("coded words. ")[2].partition("\n")[0]))
    assert [word for word, _ in counts.most_common(3)] == question.answers
    # 5,000 ζ(2)⁻¹ k⁻²; the most frequent word is the dots.
    assert [count for _, count in counts.most_common(3)] == [759, 337, 189]


def test_questions_are_answered_by_their_documents(all_tasks: dict[str, Task], tmp_path: Path) -> None:
    one, two = local()
    assert len(one.asked) > 200 and len(two.asked) > 200
    for asked in two.asked[:50]:
        function = re.search(r"function (\w+) is in", asked.query)
        assert function and any(f"Function {function[1]}\n" in text for text in asked.documents)
        assert asked.answers[0] in asked.documents[1]
    rows = [{"question": f"q{n}", "answers": [f"a{n}"], "context": [f"text a{n}"]} for n in range(3)]
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    mine = read(tmp_path / "qa.jsonl")
    assert mine(Random(0), ESSAY, 9).prompt.count("Document ") == 9
    (tmp_path / "qa.jsonl").write_text('{"question": "q", "answers": [], "context": "c"}')
    with pytest.raises(UserError, match=r"qa.jsonl line 1: expected {\"question\": text"):
        read(tmp_path / "qa.jsonl")
    (tmp_path / "qa.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="has 1 questions about 1 documents: expected more documents"):
        read(tmp_path / "qa.jsonl")


@given(per=st.floats(0.1, 50), overhead=st.integers(0, 500), room=st.integers(600, 100_000))
def test_the_text_fills_the_room(per: float, overhead: int, room: int) -> None:
    asked = []

    def count(size: int) -> int:
        asked.append(size)
        return overhead + int(per * size)

    size = largest(count, room, 1, "test")
    assert count(size) <= room and (count(size) >= 0.98 * room or count(size + 1) > room)
    assert len(asked) < 40 and max(asked) < 10 * room / per + 10


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(UserError, match="vt takes 500 tokens without its answer: increase the length"):
        largest(lambda _: 500, 400, 1, "vt")


def test_words_are_distinct_however_many() -> None:
    many = words.distinct(Random(0), words.pair, 60_000)
    assert len(set(many)) == 60_000 and all(re.fullmatch(r"[a-z]+(-[a-z]+){1,2}", word) for word in many)


def test_the_command_scores_what_the_model_writes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = export(tmp_path / "model", max_position_embeddings=3000)
    command = ["eval", "ruler", "--model", model, "--tasks", "qa_1", "niah_single_1", "--lengths", 1200, "--samples", 2]
    assert ictx(monkeypatch, *command, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "ruler: 4 samples; 4,800 tokens to read and write" in printed
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [record["task"] for record in records] == ["niah_single_1"] * 2 + ["qa_1"] * 2
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["metrics"]["ruler"] == sum(record["score"] for record in records) / 4
    assert (tmp_path / "out/ruler.png").stat().st_size > 1000
    for words_, reason in (
        (["--tasks", "niah"], "task niah is not one of RULER's: expected all, or some of niah_single_1"),
        (["--lengths", "3001"], "lengths has 3,001: expected at most the model's max_position_embeddings, 3,000"),
        (["--lengths", "200"], "niah_single_1 at length 200 takes "),
        (["--samples", "0"], "samples is 0: expected 1 or more"),
    ):
        assert ictx(monkeypatch, *command, *words_, "--out", tmp_path / "other") == 2
        printed = capsys.readouterr().err
        assert reason in printed and printed.count("\n") == 1


def test_a_model_behind_an_endpoint_answers_each_task_within_its_room(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = export(tmp_path / "model", max_position_embeddings=3000)
    decode = Vocabulary.load(model).tokenizer.decode

    def answer(body: dict[str, Any]) -> Any:
        """Repeats every number of seven digits, which is correct for needles and wrong for questions."""
        return text(" ".join(re.findall(r"[0-9]{7}", decode(body["prompt"]))))

    with serving(Server(answer=answer)) as server:
        command = [
            "eval",
            "ruler",
            "--model",
            model,
            "--tasks",
            "qa_1",
            "niah_single_1",
            "--lengths",
            1500,
            "--samples",
            3,
        ]
        command += ["--endpoint", server.url, "--batch-size", 4, "--out", tmp_path / "out"]
        assert ictx(monkeypatch, *command) == 0
    assert [body["max_tokens"] for body in server.asked] != [] and {body["model"] for body in server.asked} == {"judge"}
    assert all(len(body["prompt"]) + body["max_tokens"] <= 1500 for body in server.asked)
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [(record["task"], record["score"]) for record in records] == [("niah_single_1", 1)] * 3 + [("qa_1", 0)] * 3
