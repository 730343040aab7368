"""The judge: its requests, counts of its verdicts, and its failures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from endpoint import Server, serving, text
from evaluated import export, ictx

from ictx.errors import UserError
from ictx.evaluate import judge as grading
from ictx.evaluate import prometheus

GOOD, BAD = "the sum of a and b", "banana"


def row(number: int) -> dict[str, str]:
    return {"instruction": f"Document function {number}.", "reference": f"Returns {GOOD}, times {number}."}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("judged") / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(6)))
    return tmp_path / "prompts.jsonl"


def answers_of(prompt: str) -> tuple[str, str]:
    found = re.search(r"###Response A:\n(.*?)\n\n###Response B:\n(.*?)\n\n###", prompt, re.S)
    assert found
    return found[1], found[2]


def fair(body: dict[str, Any]) -> Any:
    """Prefers the answer with the same number as the instruction."""
    prompt = body["messages"][0]["content"]
    number = re.search(r"Document function (\d+)", prompt)
    assert number
    if "###Response A:" not in prompt:
        return text("It is fine. [RESULT] 4")
    first, _ = answers_of(prompt)
    return text(f"Because. [RESULT] {'A' if first.endswith(f'times {number[1]}.') else 'B'}")


def run(monkeypatch: pytest.MonkeyPatch, server: Server, *arguments: object) -> int:
    return ictx(monkeypatch, "eval", "judge", "--judge", server.url, "--new-tokens", 4, *arguments)


def test_the_system_text_begins_the_user_s_turn_and_the_prompt_is_the_package_s() -> None:
    rubric = prometheus.rubric("helpfulness", "absolute")
    prompt = prometheus.absolute_prompt("do {this}", "an answer", "the best", rubric)
    assert prompt.startswith("You are a fair judge assistant tasked with") and "do {this}" in prompt
    assert "###Reference Answer (Score 5):\nthe best" in prompt and "Score 5: The model consistently" in prompt
    assert "Reference" not in prometheus.relative_prompt("i", "a", "b", None, rubric).partition("###Instruction")[2]


@pytest.mark.parametrize(
    ("written", "mode", "verdict"),
    [
        ("Good. [RESULT] 4", "absolute", 4), ("So the score is: Score: 3", "absolute", 3),
        ("[RESULT] 6", "absolute", None), ("no idea", "absolute", None), ("", "absolute", None),
        ("B is better. [RESULT] B", "relative", "B"), ("[RESULT] A", "relative", "A"), ("[RESULT] C", "relative", None),
    ],
)  # fmt: skip
def test_verdicts_are_at_the_end(written: str, mode: prometheus.Mode, verdict: object) -> None:
    assert prometheus.verdict(written, mode) == verdict
    for form in ("absolute", "relative"):
        example = "It is good, on the whole. [RESULT] " + ("4" if form == "absolute" else "A")
        assert re.fullmatch(prometheus.grammar(form, 100), example)  # type: ignore[arg-type]


def verdicts(*pairs: str) -> list[dict[str, Any]]:
    return [{"verdict": None if letter == "-" else letter} for pair in pairs for letter in pair]


def test_both_orders_count_and_what_cannot_be_parsed_is_counted() -> None:
    # Two wins, one loss, one disagreement, and one pair without a verdict.
    found = grading.sum_up_relative(verdicts("AB", "AB", "BA", "AA", "A-"))
    assert found["judge_win_rate"] == (1 + 1 + 0 + 0.5) / 4
    assert (found["pairs"], found["unparsed"], found["unparsed_pairs"]) == (5, 1, 1)
    assert found["agreement"] == 0.75 and found["first_place"] == 5 / 8
    assert 0 <= found["judge_win_rate_low"] <= found["judge_win_rate"] <= found["judge_win_rate_high"] <= 1
    nothing = grading.sum_up_relative(verdicts("--", "A-"))
    assert "judge_win_rate" not in nothing and nothing["unparsed"] == 3
    grades = grading.sum_up_absolute([{"verdict": 4}, {"verdict": 2}, {"verdict": None, "error": "x"}])
    assert (grades["judge_score"], grades["unparsed"], grades["rejected"]) == (3, 1, 1)
    assert grades["grades"] == {"1": 0, "2": 1, "3": 0, "4": 1, "5": 0}


def test_a_judge_that_only_looks_at_the_order_is_no_better_than_chance() -> None:
    assert "may be no better than chance" in grading.assess(verdicts(*["AA"] * 20))[1]
    assert "prefers the right answer to a wrong one in 100%" in grading.assess(verdicts(*["AB"] * 20))[1]
    assert "may be no better than chance" in grading.assess(verdicts(*["AB"] * 3))[1], "three samples are too few"
    assert "may be no better than chance" in grading.assess(verdicts(*["BA"] * 20))[1]
    assert "its grades are meaningless" in grading.assess(verdicts("--"))[1]


def test_grades_are_asked_with_the_settings_and_summed_up(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Server(answer=fair)) as server:
        command = ["--model", checkpoint, "--prompts", prompts, "--out", tmp_path / "out", "--temperature", 0.4]
        assert run(monkeypatch, server, *command, "--check", 4, "--sampling", '{"repetition_penalty": 1.03}') == 0
    printed = capsys.readouterr().out
    assert "the judge prefers the right answer to a wrong one in 100% of 4" in printed
    assert "judge: 6 samples" in printed and "judge_score: 4 (95 %: 4 to 4)" in printed
    body = server.asked[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["repetition_penalty"]) == (
        0.4,
        0.9,
        1024,
        1.03,
    )
    assert [message["role"] for message in body["messages"]] == ["user"] and body["model"] == "judge"
    assert (tmp_path / "out/judge.png").stat().st_size > 1000


def test_two_models_are_compared_in_both_orders_and_an_interruption_costs_nothing(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = export(tmp_path / "other", initializer_range=0.3)

    def prefers_a(body: dict[str, Any]) -> Any:
        return text("Hm. [RESULT] A") if body["seed"] > 1 else text("I cannot say.")

    command = ["--model", checkpoint, "--against", other, "--prompts", prompts, "--out", tmp_path / "out", "--check", 0]
    with serving(Server(answer=prefers_a)) as server:
        # The endpoint fails after some answers, which are kept.
        server.answer = lambda body: prefers_a(body) if len(server.asked) < 12 else (401, {}, b"")
        assert run(monkeypatch, server, *command, "--batch-size", 1) == 2
        assert "requires a key" in capsys.readouterr().err
        done = len((tmp_path / "out/samples.jsonl").read_text().splitlines())
        assert done == 5
        server.answer, server.asked = prefers_a, []
        assert run(monkeypatch, server, *command) == 0
    # Each of the remaining 7 needs two requests.
    assert len(server.asked) == 14 and "12 samples, 5 of them finished before" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/result.json").read_text())
    grades = result["details"]["grades"]
    assert result["metrics"]["judge_win_rate"] == 0.5 and grades["agreement"] == 0 and grades["first_place"] == 1
    assert result["measured"]["against"] == str(other)


def test_a_judge_that_answers_nonsense_ends_it_in_one_line(
    checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Server(answer=lambda body: text("I like it."))) as server:
        command = ["--model", checkpoint, "--prompts", prompts, "--out", tmp_path / "out", "--attempts", 2]
        assert run(monkeypatch, server, *command) == 2
        printed = capsys.readouterr()
        assert "none of the judge's answers could be parsed (6 tried, 0 rejected)" in printed.err
        assert "its grades are meaningless" in printed.out and printed.err.count("\n") == 1
        server.answer = lambda body: (400, {}, b"too long")
        assert run(monkeypatch, server, *command[:4], "--out", tmp_path / "out2", "--check", 0) == 2
        assert "(6 tried, 6 rejected)" in capsys.readouterr().err
    assert len((tmp_path / "out2/samples.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--samples", "0"], "samples is 0: expected 1 or more"),
        (["--attempts", "0"], "attempts is 0: expected 1 or more"),
        (["--rubric", "beauty"], "rubric is 'beauty': expected one of helpfulness"),
        (["--rubric", "{folder}/rubric.json"], "rubric.json lacks 'score1_description'"),
        (["--sampling", "[]"], "--sampling is []: expected a JSON object"),
        (["--judge-model", "other"], "does not serve other (available: judge)"),
        (["--key-env", "NO_SUCH_KEY"], "--key-env is NO_SUCH_KEY, which is not set"),
        (["--against", "{checkpoint}"], "which has the same files as"),
        (["--new-tokens", "300"], "the model's max_position_embeddings is 256"),
        (["--prompts", "{folder}/wrong.jsonl"], 'wrong.jsonl line 2: expected {"instruction": text'),
        (["--prompts", "{folder}/empty.jsonl"], "empty.jsonl is empty: expected JSON lines"),
    ],
)
def test_wrong_requests_are_one_line(
    checkpoint: Path, prompts: Path, tmp_path: Path, arguments: list[str], reason: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "rubric.json").write_text('{"criteria": "c"}')
    (tmp_path / "empty.jsonl").write_text("\n")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "wrong.jsonl").write_text(f'{json.dumps(chat)}\n{{"messages": []}}\n')
    words = [word.format(folder=tmp_path, checkpoint=checkpoint) for word in arguments]
    with serving(Server(answer=fair)) as server:
        given = [] if "--prompts" in words else ["--prompts", prompts]
        assert run(monkeypatch, server, "--model", checkpoint, *given, *words, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert reason in printed and printed.count("\n") == 1


def test_a_chat_s_last_answer_is_the_reference() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert prometheus.row(json.dumps({"messages": turns}), "f") == ("hi", None)
    turns.append({"role": "assistant", "content": "ho"})
    assert prometheus.row(json.dumps({"messages": turns}), "f") == ("hi", "ho")
    with pytest.raises(UserError, match="f: expected"):
        prometheus.row('{"instruction": " "}', "f")
