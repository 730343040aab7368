"""`ictx eval harness`: lm-evaluation-harness against an endpoint that serves the model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from ictx.errors import UserError
from ictx.evaluate import common, plots
from ictx.evaluate.endpoint import Endpoint
from ictx.evaluate.results import Result
from ictx.evaluate.samples import open_samples
from ictx.settings import shown

VERSION = "0.4.13"
LOCK = "workload/requirements/evals.txt"


def harness(arguments: argparse.Namespace) -> int:
    """Measures tasks of the harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"lm-eval is not installed: pip install --no-deps --require-hashes -r {LOCK} (lm-eval {VERSION})"
        )
    if arguments.samples < 0 or arguments.batch_size < 1:
        name = "samples" if arguments.samples < 0 else "batch-size"
        raise UserError(
            f"{name} is {getattr(arguments, name.replace('-', '_'))}: expected {0 if name == 'samples' else 1} or more"
        )
    if arguments.tasks_dir and not arguments.tasks_dir.is_dir():
        raise UserError(f"--tasks-dir is {arguments.tasks_dir}: no such folder")
    subject = common.subject(arguments)
    endpoint = common.endpoint(arguments, arguments.endpoint, arguments.endpoint_model)
    measured = {
        "tasks": sorted(set(arguments.tasks)),
        "samples": arguments.samples,
        "shots": arguments.shots,
        "seed": arguments.seed,
        "harness": VERSION,
    }
    with open_samples(arguments.out, {"kind": "harness", "model": subject.digest, **measured}) as samples:
        names = list(dict.fromkeys(arguments.tasks))
        waiting = [task for task in names if task not in samples.done]
        if waiting:
            manager = _known(arguments, waiting)
            before = f" ({len(names) - len(waiting)} finished before)" if len(waiting) < len(names) else ""
            print(
                f"harness: {', '.join(waiting)}{before}; {arguments.samples or 'all'} questions of each, "
                f"{arguments.batch_size} requests at a time to {endpoint.url}"
            )
        for task in waiting:
            found = _evaluate(arguments, manager, task, str(subject.folder), endpoint)
            samples.add(task, {"results": json.loads(json.dumps(found["results"], default=str))})
    results = {name: values for task in names for name, values in samples.done[task]["results"].items()}
    metrics = {
        f"harness.{task}.{name.partition(',')[0]}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float) and "_stderr" not in name and math.isfinite(value)
        if name not in ("sample_len", "sample_count")
    }
    shares = {name.removeprefix("harness."): value for name, value in metrics.items() if 0 <= value <= 1}
    if shares:
        plots.bars(arguments.out / "harness.png", f"{subject}: lm-evaluation-harness", "share", shares)
    return common.publish(arguments, subject, Result("harness", str(subject), measured, metrics, {"results": results}))


def _known(arguments: argparse.Namespace, tasks: Sequence[str]) -> Any:
    """Returns the harness's registry of tasks. Raises UserError for an unknown task."""
    if arguments.tasks_dir:
        # Custom tasks have their own data, but would query the Hub first.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(arguments.tasks_dir) if arguments.tasks_dir else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"task {shown(unknown[0])} does not exist in lm-eval {VERSION}: `lm_eval ls tasks` lists all")
    return manager


def _evaluate(
    arguments: argparse.Namespace, manager: Any, task: str, tokenizer: str, endpoint: Endpoint
) -> dict[str, Any]:
    """Returns the harness's results of a task. Raises UserError if it fails."""
    from lm_eval import simple_evaluate

    if endpoint.key:
        # The harness reads the key only from here.
        os.environ["OPENAI_API_KEY"] = endpoint.key
    settings = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "num_concurrent": arguments.batch_size,
        "tokenized_requests": True,
        "max_retries": 5,
        "timeout": int(arguments.timeout),
    }
    try:
        found = simple_evaluate(
            model="local-completions",
            model_args=settings,
            tasks=[task],
            num_fewshot=arguments.shots,
            limit=arguments.samples or None,
            task_manager=manager,
            random_seed=arguments.seed,
            log_samples=False,
        )
    except Exception as error:  # of the harness, of data sets, of HTTP clients: no common base class
        raise UserError(_reason(error)) from error
    return dict(found)


def _reason(error: Exception) -> str:
    """Returns an error's cause in one line."""
    text = " ".join(str(error).split())[:300]
    if re.search(
        r"offline|[Cc]onnection|Couldn.t reach|Couldn.t find|resolve|Max retries|Network is unreachable", text
    ):
        return (
            f"a task's data cannot be downloaded, or the endpoint does not respond ({type(error).__name__}: {text}): "
            "tasks of a local folder (--tasks-dir) with local data need no network"
        )
    return f"lm-eval: {type(error).__name__}: {text}"
