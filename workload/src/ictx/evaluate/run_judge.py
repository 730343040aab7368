"""`ictx eval judge`: answers of the models, the judge's self-check, then the grades."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.evaluate import common, plots, prometheus
from ictx.evaluate import judge as grading
from ictx.evaluate.answers import Local
from ictx.evaluate.judge import Item
from ictx.evaluate.needle import fingerprint
from ictx.evaluate.results import Result
from ictx.evaluate.samples import Planned, Samples, finish, open_samples
from ictx.evaluate.subject import Subject
from ictx.folder import read_text
from ictx.settings import shown


def judge(arguments: argparse.Namespace) -> int:
    """Grades answers of a model, or compares them with another's."""
    sampling = _sampling(arguments)
    items = grading.read_items(arguments.prompts, arguments.samples, arguments.seed)
    modes: tuple[prometheus.Mode, ...] = ("absolute", "relative")
    rubrics = {mode: prometheus.rubric(arguments.rubric, mode) for mode in modes}
    endpoint = common.endpoint(arguments, arguments.judge, arguments.judge_model)
    subject = common.subject(arguments)
    other = common.subject(arguments, arguments.against) if arguments.against else None
    if other and other.digest == subject.digest:
        raise UserError(f"--against is {other}, which has the same files as {subject}: expected another model")
    asked = grading.Judge(endpoint, rubrics, sampling, arguments.attempts, arguments.constrain)
    measured = {
        "prompts": fingerprint(read_text(arguments.prompts)),
        "samples": len(items),
        "seed": arguments.seed,
        "judge": endpoint.model,
        "rubric": fingerprint(rubrics["absolute"]),
        "sampling": dict(sampling),
        "constrain": arguments.constrain,
        "new_tokens": arguments.new_tokens,
        **({"against": str(other)} if other else {}),
    }
    models = {"model": subject.digest, **({"other": other.digest} if other else {})}
    with open_samples(arguments.out, {"kind": "judge", **models, **measured}) as samples:
        planned = grading.plan_check(items, arguments.check)
        checked, worth = None, "the judge was not checked: no instructions with references, or --check 0"
        if planned:
            checked, worth = grading.assess(
                finish("check of the judge", planned, samples, asked.ask, arguments.batch_size)
            )
        print(worth)
        answers = _answers(arguments, subject, items, samples.file.with_name("answers.jsonl"))
        others = _answers(arguments, other, items, samples.file.with_name("answers-other.jsonl")) if other else None
        planned = grading.plan(items, answers, others)
        records = finish("judge", planned, samples, asked.ask, arguments.batch_size)
    found = grading.sum_up_relative(records) if other else grading.sum_up_absolute(records)
    metric = "judge_win_rate" if other else "judge_score"
    grading.require_parsed(found, metric, samples.file)
    if found["unparsed"]:
        print(
            f"{found['unparsed']} of {len(records)} verdicts could not be parsed, {found['rejected']} of them rejected"
        )
    if endpoint.retried:
        print(f"{endpoint.retried} requests to the judge were retried")
    bars = found.get("grades") or {name: found[name] for name in ("judge_win_rate", "agreement", "first_place")}
    plots.bars(arguments.out / "judge.png", f"{subject}: {endpoint.model}", "answers" if not other else "share", bars)
    metrics = {name: float(found[name]) for name in (metric, f"{metric}_low", f"{metric}_high")}
    metrics["judge_unparsed"] = float(found["unparsed"])
    if other:
        metrics["judge_agreement"] = found["agreement"]
    details = {"grades": found, "check": checked, "worth": worth, "retried": endpoint.retried}
    return common.publish(arguments, subject, Result("judge", str(subject), measured, metrics, details))


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampling parameters of the requests to the judge. Raises UserError."""
    for name in ("attempts", "max_tokens", "new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name.replace('_', '-')} is {getattr(arguments, name)}: expected 1 or more")
    if arguments.constrain and arguments.constrain < 10:
        raise UserError(f"constrain is {arguments.constrain}: expected 0, or 10 characters or more")
    try:
        more = json.loads(arguments.sampling)
    except ValueError:
        more = None
    if not isinstance(more, dict):
        raise UserError(f"--sampling is {shown(arguments.sampling)}: expected a JSON object")
    given = {"temperature": arguments.temperature, "top_p": arguments.top_p, "max_tokens": arguments.max_tokens}
    return {**given, **more}


def _answers(arguments: argparse.Namespace, subject: Subject, items: Sequence[Item], file: Path) -> list[str]:
    """Returns a model's answers, including those of an earlier start."""
    samples = Samples(file)
    missing = any(str(item.number) not in samples.done for item in items)
    if not missing:
        return [str(samples.done[str(item.number)]["answer"]) for item in items]
    model, vocabulary = common.loaded(arguments, subject)
    chat = vocabulary.chat_template is not None
    local = Local(model, vocabulary, common.prefill(arguments))
    planned = []
    for item in items:
        prompt = vocabulary.encode(item.instruction, chat)
        if len(prompt) + arguments.new_tokens > model.config.max_position_embeddings:
            raise UserError(
                f"{arguments.prompts} line {item.number}: {len(prompt)} tokens and {arguments.new_tokens} new ones "
                f"are too many: the model's max_position_embeddings is {model.config.max_position_embeddings}"
            )
        planned.append(Planned(str(item.number), len(prompt) + arguments.new_tokens, prompt))

    def work(batch: Sequence[list[int]]) -> list[dict[str, Any]]:
        return [{"answer": text} for text in local(batch, arguments.new_tokens)]

    return [str(record["answer"]) for record in finish(f"answers of {subject}", planned, samples, work)]
