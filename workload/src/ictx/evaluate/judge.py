"""Grades of a judge model, absolute and relative, and their reliability; failures are counted, never dropped."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.evaluate import prometheus
from ictx.evaluate.endpoint import Endpoint, Rejected
from ictx.evaluate.intervals import bootstrap, wilson
from ictx.evaluate.prometheus import Mode
from ictx.evaluate.samples import Planned, require_samples
from ictx.folder import read_text
from ictx.settings import shown

CHECKED = "check"
"""Key prefix of samples that check the judge with two references, one of which answers another instruction."""


@dataclass(frozen=True)
class Item:
    """An instruction."""

    number: int
    instruction: str
    reference: str | None


@dataclass(frozen=True)
class Question:
    """A request to the judge: grade an answer, or choose the better of two, which are presented in this order."""

    item: Item
    first: str
    second: str | None = None


def read_items(file: Path, count: int, seed: int) -> list[Item]:
    """Returns up to `count` instructions of a JSON lines file, sampled with the seed. Raises UserError."""
    require_samples(count)
    lines = [(number, line) for number, line in enumerate(read_text(file).splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty: expected JSON lines")
    items = [Item(number, *prometheus.row(line, f"{file} line {number}")) for number, line in lines]
    chosen = random.Random(seed).sample(items, min(count, len(items)))
    return sorted(chosen, key=lambda item: item.number)


def plan(items: Sequence[Item], answers: Sequence[str], others: Sequence[str] | None) -> list[Planned[Question]]:
    """Returns the requests: to grade each answer, or to compare the answers of two models in both orders."""
    questions = []
    for place, (item, answer) in enumerate(zip(items, answers, strict=True)):
        if others is None:
            questions.append((f"absolute {item.number}", Question(item, answer)))
        else:
            questions.append((f"relative {item.number} first", Question(item, answer, others[place])))
            questions.append((f"relative {item.number} second", Question(item, others[place], answer)))
    return [Planned(key, _size(question), question) for key, question in questions]


def plan_check(items: Sequence[Item], count: int) -> list[Planned[Question]]:
    """Returns requests with a known result: an item's reference against another item's, in both orders."""
    with_reference = [item for item in items if item.reference]
    planned = []
    for place, item in enumerate(with_reference[:count]):
        wrong = with_reference[(place + 1) % len(with_reference)].reference
        if wrong == item.reference:
            continue
        # Without the reference, which would reveal the result.
        asked = Item(item.number, item.instruction, None)
        for order, pair in (("first", (item.reference, wrong)), ("second", (wrong, item.reference))):
            question = Question(asked, str(pair[0]), pair[1])
            planned.append(Planned(f"{CHECKED} {item.number} {order}", _size(question), question))
    return planned


def _size(question: Question) -> int:
    """Returns the approximate tokens of a request: one per four characters, and 400 for the judge's instructions."""
    texts = (question.item.instruction, question.first, question.second or "", question.item.reference or "")
    return 400 + sum(map(len, texts)) // 4


@dataclass(frozen=True)
class Judge:
    """A judge model behind an endpoint."""

    endpoint: Endpoint
    rubrics: Mapping[Mode, str]
    sampling: Mapping[str, Any]
    """Parameters of each request: temperature, top_p, max_tokens, …"""
    attempts: int
    """Maximum attempts per request until the text can be parsed, each with another seed."""
    constrain: int = 0
    """Maximum characters of feedback in the format that the server enforces; 0: the format is not enforced."""

    def ask(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Returns for each request the verdict (None if it could not be parsed), the text, and the attempts.

        Raises UserError if the endpoint does not respond.
        """
        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(self._one, questions))

    def _one(self, question: Question) -> dict[str, Any]:
        item = question.item
        mode: Mode = "absolute" if question.second is None else "relative"
        rubric = self.rubrics[mode]
        if question.second is None:
            prompt = prometheus.absolute_prompt(item.instruction, question.first, item.reference, rubric)
        else:
            prompt = prometheus.relative_prompt(
                item.instruction, question.first, question.second, item.reference, rubric
            )
        extra: dict[str, Any] = {}
        if self.constrain:
            extra["structured_outputs"] = {"regex": prometheus.grammar(mode, self.constrain)}
        text, attempt = "", 0
        for attempt in range(1, self.attempts + 1):
            try:
                text = self.endpoint.chat(prompt, **self.sampling, **extra, seed=attempt)
            except Rejected as error:
                # For example, the prompt is too long: other attempts would fail too.
                return {"verdict": None, "error": str(error), "attempts": attempt}
            found = prometheus.verdict(text, mode)
            if found is not None:
                return {"verdict": found, "text": text, "attempts": attempt}
        return {"verdict": None, "text": text, "attempts": attempt}


def sum_up_absolute(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the mean grade with its interval, the count of each grade, and the counts of failures."""
    grades = [record["verdict"] for record in records if record["verdict"] is not None]
    found: dict[str, Any] = {"answers": len(records), "unparsed": len(records) - len(grades)}
    found["rejected"] = sum("error" in record for record in records)
    found["grades"] = {str(grade): grades.count(grade) for grade in range(1, 6)}
    if grades:
        mean = bootstrap(grades)
        found |= {"judge_score": mean.mean, "judge_score_low": mean.low, "judge_score_high": mean.high}
    return found


def sum_up_relative(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the win rate of the first model; `records` are pairs, its answer presented first, then second.

    A pair counts only if both verdicts were parsed: 1 if both are for the model, 0 if both are for the other, ½ if they
    differ. `agreement` is the share of pairs with equal verdicts, `first_place` the share of verdicts for the answer
    that was presented first.
    """
    pairs = [(a["verdict"], b["verdict"]) for a, b in zip(records[::2], records[1::2], strict=True)]
    whole = [pair for pair in pairs if None not in pair]
    points = [((a == "A") + (b == "B")) / 2 for a, b in whole]
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "unparsed": sum(verdict is None for pair in pairs for verdict in pair),
        "unparsed_pairs": len(pairs) - len(whole),
        "rejected": sum("error" in record for record in records),
    }
    if whole:
        rate = bootstrap(points)
        verdicts = [verdict for pair in whole for verdict in pair]
        found |= {
            "judge_win_rate": rate.mean,
            "judge_win_rate_low": rate.low,
            "judge_win_rate_high": rate.high,
            "agreement": sum(point != 0.5 for point in points) / len(points),
            "first_place": verdicts.count("A") / len(verdicts),
        }
    return found


def assess(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Returns how often the judge prefers the right answer to a wrong one, and a sentence about its reliability."""
    found = sum_up_relative(records)
    if "judge_win_rate" not in found:
        return (
            found,
            f"none of the judge's {len(records)} verdicts in its check could be parsed: its grades are meaningless",
        )
    pairs = found["pairs"] - found["unparsed_pairs"]
    # With few pairs, all of which may be right, a bootstrap interval would be too narrow.
    rate, low, high = wilson(found["judge_win_rate"], pairs)
    numbers = f"{rate:.0%} of {pairs} (95 %: {low:.0%} to {high:.0%})"
    numbers += f", both orders agree in {found['agreement']:.0%}"
    if low > 0.5:
        return found, f"the judge prefers the right answer to a wrong one in {numbers}"
    return found, f"the judge may be no better than chance: it prefers the right answer to a wrong one in {numbers}"


def require_parsed(found: Mapping[str, Any], metric: str, samples: Path) -> None:
    """Raises UserError if none of the judge's answers could be parsed."""
    if metric not in found:
        raise UserError(
            f"none of the judge's answers could be parsed ({found['unparsed']} tried, {found['rejected']} rejected): "
            f"see {shown(str(samples))}; --constrain makes vLLM enforce the format"
        )
