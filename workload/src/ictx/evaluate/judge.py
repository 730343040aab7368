"""Grades of a judge model, absolute and relative, and how reliable they are: what failed is counted, never dropped."""

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
"""Begins the keys of samples that check the judge: two references, of which one answers another instruction."""


@dataclass(frozen=True)
class Item:
    """An instruction."""

    number: int
    instruction: str
    reference: str | None


@dataclass(frozen=True)
class Question:
    """What the judge is requested to do: to grade an answer, or to choose between two, of which `first` comes first."""

    item: Item
    first: str
    second: str | None = None


def read_items(file: Path, count: int, seed: int) -> list[Item]:
    """Returns up to `count` instructions of a file of JSON lines, chosen by the seed. Raises UserError."""
    require_samples(count)
    lines = [(number, line) for number, line in enumerate(read_text(file).splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty: expected JSON lines")
    items = [Item(number, *prometheus.row(line, f"{file} line {number}")) for number, line in lines]
    chosen = random.Random(seed).sample(items, min(count, len(items)))
    return sorted(chosen, key=lambda item: item.number)


def plan(items: Sequence[Item], answers: Sequence[str], others: Sequence[str] | None) -> list[Planned[Question]]:
    """Returns the requests: a grade for each answer, or for two models' answers the better one, in both orders."""
    questions = []
    for place, (item, answer) in enumerate(zip(items, answers, strict=True)):
        if others is None:
            questions.append((f"absolute {item.number}", Question(item, answer)))
        else:
            questions.append((f"relative {item.number} first", Question(item, answer, others[place])))
            questions.append((f"relative {item.number} second", Question(item, others[place], answer)))
    return [Planned(key, _size(question), question) for key, question in questions]


def plan_check(items: Sequence[Item], count: int) -> list[Planned[Question]]:
    """Returns questions whose right answer is known: an item's reference beside that of another, in both orders."""
    with_reference = [item for item in items if item.reference]
    planned = []
    for place, item in enumerate(with_reference[:count]):
        wrong = with_reference[(place + 1) % len(with_reference)].reference
        if wrong == item.reference:
            continue
        # Without the reference, which would be the answer.
        asked = Item(item.number, item.instruction, None)
        for order, pair in (("first", (item.reference, wrong)), ("second", (wrong, item.reference))):
            question = Question(asked, str(pair[0]), pair[1])
            planned.append(Planned(f"{CHECKED} {item.number} {order}", _size(question), question))
    return planned


def _size(question: Question) -> int:
    """Returns about how many tokens a question has: four characters each, and the instructions."""
    texts = (question.item.instruction, question.first, question.second or "", question.item.reference or "")
    return 400 + sum(map(len, texts)) // 4


@dataclass(frozen=True)
class Judge:
    """A judge model behind an endpoint."""

    endpoint: Endpoint
    rubrics: Mapping[Mode, str]
    sampling: Mapping[str, Any]
    """Sent with each request: temperature, top_p, max_tokens, …"""
    attempts: int
    """Requests to a judge whose text cannot be parsed, each time with another seed."""
    constrain: int = 0
    """Characters of feedback where the server holds the judge to the format, 0 where it does not."""

    def ask(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Returns for each question the verdict (None where none could be parsed), the text, and the attempts.

        Raises UserError where the endpoint does not answer.
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
                # A prompt that the judge cannot take (too long, for example): no other attempt will do.
                return {"verdict": None, "error": str(error), "attempts": attempt}
            found = prometheus.verdict(text, mode)
            if found is not None:
                return {"verdict": found, "text": text, "attempts": attempt}
        return {"verdict": None, "text": text, "attempts": attempt}


def sum_up_absolute(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the mean grade with its interval, how often each was given, and what could not be parsed."""
    grades = [record["verdict"] for record in records if record["verdict"] is not None]
    found: dict[str, Any] = {"answers": len(records), "unparsed": len(records) - len(grades)}
    found["rejected"] = sum("error" in record for record in records)
    found["grades"] = {str(grade): grades.count(grade) for grade in range(1, 6)}
    if grades:
        mean = bootstrap(grades)
        found |= {"judge_score": mean.mean, "judge_score_low": mean.low, "judge_score_high": mean.high}
    return found


def sum_up_relative(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the share of pairs that the first model wins; `records` come in pairs, its answer first and second.

    A pair counts where both orders were parsed: 1 where both name the model, 0 where both name the other, ½ where they
    disagree. `agreement` is the share of pairs where they agree, `first_place` that of verdicts for what came first.
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
    """Returns how often the judge prefers the right answer to a wrong one, and in words what its grades are worth."""
    found = sum_up_relative(records)
    if "judge_win_rate" not in found:
        return (
            found,
            f"none of the judge's {len(records)} verdicts about itself could be parsed: its grades mean nothing",
        )
    pairs = found["pairs"] - found["unparsed_pairs"]
    # Of few pairs, which may all be right, the bootstrap would be too sure.
    rate, low, high = wilson(found["judge_win_rate"], pairs)
    numbers = f"{rate:.0%} of {pairs} (95 %: {low:.0%} to {high:.0%})"
    numbers += f", both orders agree in {found['agreement']:.0%}"
    if low > 0.5:
        return found, f"the judge prefers the right answer to a wrong one in {numbers}"
    return found, f"the judge may be no better than chance: it prefers the right answer to a wrong one in {numbers}"


def require_parsed(found: Mapping[str, Any], metric: str, samples: Path) -> None:
    """Raises UserError where nothing that the judge answered could be parsed."""
    if metric not in found:
        raise UserError(
            f"none of the judge's answers could be parsed ({found['unparsed']} tried, {found['rejected']} rejected): "
            f"see {shown(str(samples))}; --constrain holds a judge that vLLM serves to the format"
        )
