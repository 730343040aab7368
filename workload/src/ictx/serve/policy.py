"""What a version must show before an alias moves to it: its evaluations, beside those of the version before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ictx.errors import UserError
from ictx.registry import EVAL_TAG
from ictx.settings import build, load_yaml

KINDS = {
    "perplexity": "perplexity",
    "bits_per_byte": "perplexity",
    "needle": "needle",
    "needle_nats": "needle",
    "ruler": "ruler",
    "judge_score": "judge",
    "judge_win_rate": "judge",
}
"""Metrics of `ictx eval`, and the command that measures each. Those of the harness are `harness.TASK.METRIC`."""


class Refused(UserError):
    """The policy does not admit a version."""


@dataclass(frozen=True)
class Rule:
    """What is required of a metric."""

    better: Literal["lower", "higher"]
    """Which numbers are better."""
    required: bool = False
    """Whether a version without it is refused."""
    margin: float | None = None
    """How much worse than the champion's number it may be; it is not compared unless given."""
    relative: bool = False
    """Whether the margin is a share of the champion's number."""
    limit: float | None = None
    """The worst number that is admitted, whatever the champion's is."""
    bound: Literal["value", "low", "high"] = "value"
    """What the limit counts for: the number, or an end of its 95 % interval."""
    against_champion: bool = False
    """Whether it must have been measured against the champion (win rates); without one it is not required."""

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"margin is {self.margin}: expected 0 or more")


@dataclass(frozen=True)
class Policy:
    """The rules of a file."""

    metrics: dict[str, Rule] = field(default_factory=dict)
    """By the metric's name."""
    incomparable: Literal["refuse", "pass"] = "refuse"
    """What follows where the champion has no such number, or one of other text, lengths or samples."""

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in KINDS and not name.startswith("harness."):
                raise ValueError(
                    f"metrics.{name} is no metric: expected one of {', '.join(KINDS)}, harness.TASK.METRIC"
                )

    @classmethod
    def read(cls, file: Path) -> Policy:
        """Returns the policy in a YAML file. Raises UserError naming the file and the setting that is wrong."""
        try:
            return build(cls, load_yaml(file))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


@dataclass(frozen=True)
class Evaluated:
    """A version and what its tags hold of it."""

    uri: str
    """models:/NAME/VERSION."""
    tags: Mapping[str, str]

    def number(self, metric: str) -> float | None:
        """Returns a metric. Raises UserError for a tag that is no number."""
        text = self.tags.get(f"{EVAL_TAG}{metric}")
        try:
            value = None if text is None else float(text)
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"{self.uri} has the tag {EVAL_TAG}{metric} = {text!r}: expected a number; evaluate it again"
            )
        return value

    def about(self, metric: str, what: str) -> str | None:
        """Returns what the evaluation behind a metric notes: `measured`, `against`."""
        return self.tags.get(f"{EVAL_TAG}{kind(metric)}.{what}")


def kind(metric: str) -> str:
    """Returns the command of `ictx eval` that measures a metric."""
    return KINDS.get(metric, "harness")


def check(policy: Policy, version: Evaluated, champion: Evaluated | None) -> list[str]:
    """Returns what was compared, a line each. Raises Refused naming the metrics and their numbers."""
    lines: list[str] = []
    reasons: list[str] = []
    for metric, rule in policy.metrics.items():
        for passed, line in _findings(policy, metric, rule, version, champion):
            (lines if passed else reasons).append(line)
    if reasons:
        raise Refused(f"{version.uri} is refused: {'; '.join(reasons)} (--force --reason TEXT overrules)")
    return lines


def _findings(
    policy: Policy, metric: str, rule: Rule, version: Evaluated, champion: Evaluated | None
) -> Iterator[tuple[bool, str]]:
    """Yields whether each part of a rule is met, and the line that names its numbers."""
    if rule.against_champion and champion is None:
        return
    number, command = version.number(metric), f"ictx eval {kind(metric)} --model"
    if number is None:
        if rule.required:
            yield False, f"{metric} is not measured: {command} {version.uri}"
        return
    sign = 1.0 if rule.better == "higher" else -1.0
    word = {1.0: "at least", -1.0: "at most"}[sign]
    if rule.limit is not None:
        value = number if rule.bound == "value" else version.number(f"{metric}_{rule.bound}")
        name = metric if rule.bound == "value" else f"{metric} ({rule.bound} end of the 95 % interval)"
        if value is None:
            yield False, f"{name} is not measured: {command} {version.uri}"
        else:
            yield sign * value >= sign * rule.limit, f"{name} is {value:.4g}, {word} {rule.limit:.4g} is required"
    if champion is None:
        return
    if rule.against_champion:
        against = version.about(metric, "against")
        if against != champion.uri:
            yield False, f"{metric} is measured against {against or 'nothing'}, the champion is {champion.uri}"
    if rule.margin is None:
        return
    theirs, incomparable = champion.number(metric), policy.incomparable == "pass"
    if theirs is None:
        yield incomparable, f"{metric} of the champion is not measured: {command} {champion.uri}"
    elif version.about(metric, "measured") != champion.about(metric, "measured"):
        yield incomparable, f"{metric} of the champion was measured on other samples: evaluate {champion.uri} alike"
    else:
        allowed = theirs - sign * rule.margin * (abs(theirs) if rule.relative else 1.0)
        numbers = f"{metric} is {number:.4g}, the champion's ({champion.uri}) {theirs:.4g}"
        yield sign * number >= sign * allowed, f"{numbers}: {word} {allowed:.4g} is required"
