"""The promotion policy: requirements on a version's evaluation results, also relative to the current champion."""

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
"""Metrics of `ictx eval`, and the command that measures each. Metrics of the harness are `harness.TASK.METRIC`."""


class Refused(UserError):
    """The policy rejects a version."""


@dataclass(frozen=True)
class Rule:
    """Requirements on a metric."""

    better: Literal["lower", "higher"]
    """Whether lower or higher values are better."""
    required: bool = False
    """Whether a version without the metric is rejected."""
    margin: float | None = None
    """Maximum by which it may be worse than the champion's; if unset, it is not compared."""
    relative: bool = False
    """Whether the margin is relative to the champion's value."""
    limit: float | None = None
    """The worst accepted value, independent of the champion."""
    bound: Literal["value", "low", "high"] = "value"
    """What the limit applies to: the value, or an end of its 95 % confidence interval."""
    against_champion: bool = False
    """Whether it must have been measured against the champion (win rates); ignored without a champion."""

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"margin is {self.margin}: expected 0 or more")


@dataclass(frozen=True)
class Policy:
    """The rules of a file."""

    metrics: dict[str, Rule] = field(default_factory=dict)
    """By the metric's name."""
    incomparable: Literal["refuse", "pass"] = "refuse"
    """Result if the champion lacks the metric, or has one measured on other text, lengths or samples."""

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in KINDS and not name.startswith("harness."):
                raise ValueError(
                    f"metrics.{name} is not a metric: expected one of {', '.join(KINDS)}, harness.TASK.METRIC"
                )

    @classmethod
    def read(cls, file: Path) -> Policy:
        """Returns the policy in a YAML file. Raises UserError with the file and the invalid setting."""
        try:
            return build(cls, load_yaml(file))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


@dataclass(frozen=True)
class Evaluated:
    """A version and its tags."""

    uri: str
    """models:/NAME/VERSION."""
    tags: Mapping[str, str]

    def number(self, metric: str) -> float | None:
        """Returns a metric's value; None if it was not measured. Raises UserError if the tag is not a number."""
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
        """Returns a note of the evaluation of a metric: `measured` or `against`."""
        return self.tags.get(f"{EVAL_TAG}{kind(metric)}.{what}")


def kind(metric: str) -> str:
    """Returns the command of `ictx eval` that measures a metric."""
    return KINDS.get(metric, "harness")


def check(policy: Policy, version: Evaluated, champion: Evaluated | None) -> list[str]:
    """Returns one line per comparison. Raises Refused with the failed comparisons."""
    lines: list[str] = []
    reasons: list[str] = []
    for metric, rule in policy.metrics.items():
        for passed, line in _findings(policy, metric, rule, version, champion):
            (lines if passed else reasons).append(line)
    if reasons:
        raise Refused(f"{version.uri} is rejected: {'; '.join(reasons)} (override: --force --reason TEXT)")
    return lines


def _findings(
    policy: Policy, metric: str, rule: Rule, version: Evaluated, champion: Evaluated | None
) -> Iterator[tuple[bool, str]]:
    """Yields for each part of a rule whether it passed, and a line with the values."""
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
