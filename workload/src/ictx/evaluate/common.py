"""Common parts of `ictx eval` commands: model, inference settings, endpoint, and publication of results."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ictx.errors import UserError
from ictx.evaluate.endpoint import Endpoint
from ictx.evaluate.results import Result, log
from ictx.evaluate.subject import Subject, find
from ictx.folder import read_text
from ictx.infer.likelihood import Prefill
from ictx.infer.loading import load
from ictx.infer.vocabulary import Vocabulary
from ictx.model import Transformer
from ictx.model.cache import CACHE_DTYPES
from ictx.model.hf_config import read_hf_config


def subject(arguments: argparse.Namespace, name: str | None = None) -> Subject:
    """Returns the model of `--model`, or of another option's value."""
    given: Path | None = arguments.models
    return find(name or arguments.model, arguments.out, given or Path(arguments.out.resolve().parent, "models"))


def prefill(arguments: argparse.Namespace) -> Prefill:
    """Returns the prefill settings."""
    dtype = CACHE_DTYPES.get(arguments.cache_dtype, arguments.cache_dtype)
    return Prefill(arguments.chunk_size, dtype, getattr(arguments, "beyond", False))


def loaded(arguments: argparse.Namespace, subject: Subject) -> tuple[Transformer, Vocabulary]:
    """Returns the model and its tokenizer."""
    return load(subject.folder, arguments.dtype, arguments.device)


def context(subject: Subject) -> int:
    """Returns the model's context in tokens."""
    return read_hf_config(subject.folder)[0].max_position_embeddings


def lengths(arguments: argparse.Namespace, subject: Subject, beyond: bool = False) -> list[int]:
    """Returns the requested lengths, or four up to the context. Raises UserError for one that is too long."""
    most = context(subject)
    chosen = sorted(set(arguments.lengths or [most >> back for back in range(4)]))
    if chosen[0] < 1:
        raise UserError(f"lengths has {chosen[0]}: expected 1 or more")
    if chosen[-1] > most and not beyond:
        raise UserError(f"lengths has {chosen[-1]:,}: expected at most the model's max_position_embeddings, {most:,}")
    return chosen


def dtype_name(model: Transformer) -> str:
    """Returns the name of the weights' dtype."""
    return str(model.lm_head.weight.dtype).removeprefix("torch.")


def endpoint(arguments: argparse.Namespace, url: str, model: str) -> Endpoint:
    """Returns an endpoint after checking that it responds, accepts the key and serves the model. Raises UserError."""
    found = Endpoint(url, model, _key(arguments), arguments.timeout)
    found.check()
    return found


def _key(arguments: argparse.Namespace) -> str:
    if arguments.key_file:
        return read_text(arguments.key_file).strip()
    if arguments.key_env and not os.environ.get(arguments.key_env):
        raise UserError(f"--key-env is {arguments.key_env}, which is not set")
    return os.environ[arguments.key_env].strip() if arguments.key_env else ""


def publish(arguments: argparse.Namespace, subject: Subject, result: Result) -> int:
    """Writes a result, prints its numbers, and logs it on the registered version; returns the exit status."""
    result.write(arguments.out)
    for name, value in result.metrics.items():
        if not name.endswith(("_low", "_high")):
            low, high = result.metrics.get(f"{name}_low"), result.metrics.get(f"{name}_high")
            interval = "" if low is None or high is None else f" (95 %: {low:.4g} to {high:.4g})"
            print(f"{name}: {value:.4g}{interval}")
    print(f"{subject}: {arguments.out}")
    if subject.ref and arguments.log:
        print(f"logged on {subject}, tables and pictures in MLflow run {log(subject, result, arguments.out)}")
    return 0
