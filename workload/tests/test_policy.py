"""The gate of `ictx promote`: a rejection gives the metric and its numbers, and a forced promotion is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluated import ictx
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from test_serve import NAME, Registered, client, empty_store, exported, registered  # noqa: F401

from ictx.errors import UserError
from ictx.registry import EVAL_TAG, FORCED_TAG, OVERRULED_TAG
from ictx.serve.policy import Evaluated, Policy, Refused, Rule, check
from ictx.settings import config_path

SHIPPED = Policy.read(config_path("promote.yaml"))
GOOD = {"perplexity": 10.0, "needle": 0.9, "ruler": 0.8}


def version(number: int, against: str = "", **metrics: float) -> Evaluated:
    tags = {f"{EVAL_TAG}{name}": f"{value:.6g}" for name, value in metrics.items()}
    tags |= {f"{EVAL_TAG}{kind}.measured": "alike" for kind in ("perplexity", "needle", "ruler", "judge")}
    return Evaluated(f"models:/m/{number}", tags | ({f"{EVAL_TAG}judge.against": against} if against else {}))


def test_a_first_version_needs_evaluations_and_no_comparison() -> None:
    assert check(SHIPPED, version(1, perplexity=1e9), None) == []
    with pytest.raises(
        Refused, match="models:/m/1 is rejected: perplexity is not measured: ictx eval perplexity --model"
    ):
        check(SHIPPED, version(1, needle=1.0), None)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"perplexity": 10.3}, r"perplexity is 10.3, the champion's \(models:/m/1\) 10: at most 10.2 is required"),
        ({"needle": 0.84}, r"needle is 0.84, the champion's \(models:/m/1\) 0.9: at least 0.85 is required"),
        ({"ruler": 0.5}, r"ruler is 0.5, the champion's"),
        ({"judge_win_rate": 0.6}, "judge_win_rate .low end of the 95 % interval. is not measured"),
        ({"judge_win_rate": 0.6, "judge_win_rate_low": 0.39}, r"low end of the 95 % interval\) is 0.39, at least 0.4"),
    ],
)
def test_a_worse_version_is_refused_with_the_metric_and_its_numbers(metrics: dict[str, float], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        check(SHIPPED, version(2, "models:/m/1", **(GOOD | metrics)), version(1, **GOOD))


def test_every_reason_is_named() -> None:
    with pytest.raises(
        Refused, match=r"perplexity is 20.*; needle is 0, .*; ruler is 0, .*override: --force --reason TEXT"
    ):
        check(SHIPPED, version(2, perplexity=20, needle=0, ruler=0), version(1, **GOOD))


def test_a_version_within_the_margins_is_admitted() -> None:
    close = {"perplexity": 10.2, "needle": 0.85, "ruler": 0.78, "judge_win_rate": 0.5, "judge_win_rate_low": 0.4}
    assert len(check(SHIPPED, version(2, "models:/m/1", **close), version(1, **GOOD))) == 4
    # A win against another version does not count.
    with pytest.raises(Refused, match="measured against models:/m/7, the champion is models:/m/1"):
        check(SHIPPED, version(2, "models:/m/7", **close), version(1, **GOOD))


def test_numbers_of_other_samples_are_not_compared() -> None:
    champion = Evaluated("models:/m/1", {**version(1, **GOOD).tags, f"{EVAL_TAG}perplexity.measured": "other"})
    unmeasured = Evaluated("models:/m/1", {})
    lenient = Policy(SHIPPED.metrics, incomparable="pass")
    for other, reason in ((champion, "measured on other samples: evaluate models:/m/1"), (unmeasured, "not measured")):
        with pytest.raises(Refused, match=reason):
            check(SHIPPED, version(2, **GOOD), other)
        assert any(reason in line for line in check(lenient, version(2, **GOOD), other))


@given(
    better=st.sampled_from(["lower", "higher"]), margin=st.floats(0, 1), relative=st.booleans(),
    champion=st.floats(0.1, 100), change=st.floats(-50, 50),
)  # fmt: skip
def test_the_margin_is_the_only_thing_that_counts(
    better: str, margin: float, relative: bool, champion: float, change: float
) -> None:
    policy = Policy({"ruler": Rule(better, margin=margin, relative=relative)})  # type: ignore[arg-type]
    theirs = float(f"{champion:.6g}")
    ours = float(f"{theirs + change:.6g}")
    worse = (ours - theirs) * (1 if better == "lower" else -1)
    slack = worse - margin * (theirs if relative else 1)
    if abs(slack) > 1e-9 * max(theirs, abs(ours)):
        try:
            check(policy, version(2, ruler=ours), version(1, ruler=theirs))
            assert slack < 0
        except Refused:
            assert slack > 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("metrics: {perplexty: {better: lower}}", "metrics.perplexty is not a metric: expected one of perplexity"),
        ("metrics: {needle: {better: more}}", "setting metrics.needle.better is 'more': expected one of lower, higher"),
        ("metrics: {needle: {better: higher, margin: -1}}", "margin is -1.0: expected 0 or more"),
        ("incomparable: ignore", "setting incomparable is 'ignore': expected one of refuse, pass"),
        ("[]", "expected keys and values"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        Policy.read(tmp_path / "policy.yaml")


def test_a_tag_that_is_no_number_is_refused() -> None:
    broken = Evaluated("models:/m/2", {f"{EVAL_TAG}perplexity": "nan"})
    with pytest.raises(UserError, match=r"tag ictx.eval.perplexity = 'nan': expected a number"):
        check(SHIPPED, broken, None)


def measured(client: MlflowClient, number: str, perplexity: float) -> None:  # noqa: F811
    for name, value in {"perplexity": str(perplexity), "perplexity.measured": "alike"}.items():
        client.set_model_version_tag(NAME, number, f"{EVAL_TAG}{name}", value)


def test_the_command_refuses_with_status_3_and_a_forced_version_keeps_why(
    client: MlflowClient, registered: Registered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip

    def promote(number: str, *more: str) -> int:
        return ictx(monkeypatch, "promote", number, "--alias", "champion", *more)

    first, second = registered(), registered()
    assert promote(first) == 3
    assert capsys.readouterr().err == (
        f"ictx: models:/{NAME}/1 is rejected: perplexity is not measured: ictx eval perplexity --model models:/{NAME}/1"
        " (override: --force --reason TEXT)\n"
    )
    assert "champion" not in client.get_registered_model(NAME).aliases
    measured(client, first, 10)
    assert promote(first) == 0
    measured(client, second, 11)
    assert promote(second) == 3 and "perplexity is 11, the champion's" in capsys.readouterr().err
    assert promote(second, "--force") == 2 and "--force and --reason must be used together" in capsys.readouterr().err
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == first
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    assert promote(second, "--force", "--reason", "a\n fix") == 0
    assert "overridden: " in capsys.readouterr().out
    tags = client.get_model_version(NAME, second).tags
    assert tags[FORCED_TAG].startswith("alice, 20") and tags[FORCED_TAG].endswith(": a fix")
    assert "perplexity is 11" in tags[OVERRULED_TAG]
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == second
    # Back to the first, which is better: this needs no force, and is not recorded as forced.
    assert promote(first) == 0
    assert FORCED_TAG not in client.get_model_version(NAME, first).tags
