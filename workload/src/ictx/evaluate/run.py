"""`ictx eval perplexity`, `needle` and `ruler`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ictx.errors import UserError
from ictx.evaluate import common, plots
from ictx.evaluate import needle as needles
from ictx.evaluate import perplexity as texts
from ictx.evaluate.answers import Local, Remote
from ictx.evaluate.intervals import bootstrap
from ictx.evaluate.results import Result
from ictx.evaluate.ruler import questions
from ictx.evaluate.ruler.task import pick
from ictx.evaluate.ruler.tasks import NAMES, Essay, Prompts, tasks
from ictx.evaluate.samples import Planned, finish, open_samples, require_samples
from ictx.infer.vocabulary import Vocabulary


def perplexity(arguments: argparse.Namespace) -> int:
    """Measures perplexity and bits per byte, overall and by position."""
    require_samples(arguments.samples)
    prefill, subject = common.prefill(arguments), common.subject(arguments)
    most = common.context(subject)
    length = min(4096, most) if arguments.length is None else arguments.length
    if not 1 <= length <= most:
        raise UserError(f"length is {length}: expected 1 to the model's max_position_embeddings, {most}")
    model, vocabulary = common.loaded(arguments, subject)
    if arguments.data:
        split, whole = arguments.split, arguments.whole_documents
        text = texts.prepared(arguments.data, vocabulary, length, arguments.samples, split, whole)
    else:
        text = texts.files(arguments.files, vocabulary, length, arguments.samples)
    sizes = texts.bytes_of_tokens(vocabulary.tokenizer)
    settings = {"kind": "perplexity", "model": subject.digest, "dtype": common.dtype_name(model), **text.origin}
    with open_samples(arguments.out, settings) as samples:
        records = finish(
            "perplexity",
            text.plan(),
            samples,
            lambda windows: list(texts.measure(model, windows, sizes, prefill)),
            arguments.batch_size,
        )
    found = texts.sum_up(records, len(text.windows[0]) - 1)
    buckets = found.pop("buckets")
    points = {"perplexity": [(bucket["last"] + 1, bucket["perplexity"]) for bucket in buckets]}
    plots.curve(arguments.out / "perplexity.png", f"{subject}", "position", "perplexity", points)
    metrics = {name: found[name] for name in ("perplexity", "perplexity_low", "perplexity_high", "bits_per_byte")}
    details = {"buckets": buckets, "tokens": found["tokens"], "nats_per_token": found["nats_per_token"]}
    return common.publish(arguments, subject, Result("perplexity", str(subject), text.origin, metrics, details))


def needle(arguments: argparse.Namespace) -> int:
    """Measures which needles are found, by length and depth."""
    prefill, subject = common.prefill(arguments), common.subject(arguments)
    chosen = common.lengths(arguments, subject, arguments.beyond)
    planned = needles.plan(chosen, arguments.depths, arguments.samples)
    model, vocabulary = common.loaded(arguments, subject)
    text = needles.haystack_text(arguments.haystack)
    haystack = needles.Haystack.of(text, vocabulary)
    # Fail before the first computation if a needle does not fit: the shortest is first.
    needles.build(planned[0].content, haystack, vocabulary, arguments.seed)
    measured = {
        "lengths": chosen,
        "depths": sorted(set(arguments.depths)),
        "samples": arguments.samples,
        "seed": arguments.seed,
        "haystack": needles.fingerprint(text),
    }
    settings = {"kind": "needle", "model": subject.digest, "dtype": common.dtype_name(model), **measured}
    with open_samples(arguments.out, settings) as samples:
        records = finish(
            "needle",
            planned,
            samples,
            lambda batch: [
                needles.measure(model, vocabulary, haystack, each, prefill, arguments.seed) for each in batch
            ],
        )
    found = needles.sum_up(records)
    plots.heat_map(arguments.out / "needle.png", f"{subject}: needles found", found["grid"], "found")
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    details = {"lengths": found["lengths"], "grid": found["grid"]}
    return common.publish(arguments, subject, Result("needle", str(subject), measured, metrics, details))


def ruler(arguments: argparse.Namespace) -> int:
    """Measures RULER's tasks with a model on this machine or behind an endpoint."""
    require_samples(arguments.samples)
    if arguments.endpoint is None and arguments.batch_size != 1:
        raise UserError("batch-size requires --endpoint: a model on this machine computes one prompt at a time")
    prefill, subject = common.prefill(arguments), common.subject(arguments)
    chosen, names = common.lengths(arguments, subject), pick(arguments.tasks, NAMES)
    if arguments.questions:
        asked = questions.read(arguments.questions)
        pair = asked, asked
    else:
        pair = questions.local()
    answers: Local | Remote
    if arguments.endpoint:
        vocabulary = Vocabulary.load(subject.folder)
        answers, computed = Remote(common.endpoint(arguments, arguments.endpoint, arguments.endpoint_model)), "endpoint"
    else:
        model, vocabulary = common.loaded(arguments, subject)
        answers, computed = Local(model, vocabulary, prefill), common.dtype_name(model)
    text = needles.haystack_text(arguments.haystack)
    prompts = Prompts(tasks(*pair), Essay(text), vocabulary, arguments.chat, arguments.seed)
    sizes = {(name, length): prompts.size(name, length) for length in chosen for name in names}
    planned = [
        Planned(f"{name} {length} {number}", length, (name, length, number))
        for (name, length) in sizes
        for number in range(arguments.samples)
    ]

    def work(batch: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
        made = [prompts.fitting(name, length, number, sizes[name, length]) for name, length, number in batch]
        written = [""] * len(batch)
        # A batch may contain several tasks, whose answers have different maximum lengths.
        for most in {prompts.tasks[name].new_tokens for name, _, _ in batch}:
            places = [place for place, (name, _, _) in enumerate(batch) if prompts.tasks[name].new_tokens == most]
            for place, text in zip(places, answers([made[place][0] for place in places], most), strict=True):
                written[place] = text
        return [
            {
                "task": name,
                "length": length,
                "tokens": len(tokens),
                "answers": question.answers,
                "text": text,
                "score": prompts.tasks[name].score(text, question.answers),
            }
            for (name, length, _), (tokens, question), text in zip(batch, made, written, strict=True)
        ]

    measured = {
        "tasks": names,
        "lengths": chosen,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "chat": arguments.chat,
        "haystack": needles.fingerprint(text),
        "questions": needles.fingerprint(repr(pair[0].asked) + repr(pair[1].asked)),
    }
    settings = {"kind": "ruler", "model": subject.digest, "computed": computed, **measured}
    with open_samples(arguments.out, settings) as samples:
        records = finish("ruler", planned, samples, work, arguments.batch_size)
    share = bootstrap([record["score"] for record in records])
    lines = {name: [(length, _mean(records, name, length)) for length in chosen] for name in names}
    grid = [{"task": name, **{f"{length:,}": score for length, score in points}} for name, points in lines.items()]
    plots.curve(arguments.out / "ruler.png", f"{subject}: RULER", "tokens", "score", lines)
    metrics = {"ruler": share.mean, "ruler_low": share.low, "ruler_high": share.high}
    metrics |= {f"ruler_{length}": _mean(records, None, length) for length in chosen}
    return common.publish(arguments, subject, Result("ruler", str(subject), measured, metrics, {"grid": grid}))


def _mean(records: Sequence[dict[str, Any]], task: str | None, length: int) -> float:
    """Returns the mean score of a task, or of all, at a length."""
    scores = [each["score"] for each in records if each["length"] == length and task in (None, each["task"])]
    return float(sum(scores) / len(scores))
