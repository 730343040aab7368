"""Ansible filters: validate, complete and sort the stages of the pipeline (`slurm_jobs_stages`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

TRAINING = ("pretrain", "extend", "sft", "dpo")
KINDS = (*TRAINING, "eval", "judge", "promote")
OPTIONS: dict[str, Any] = {
    "after": {"type": "str"},
    "alias": {"type": "str"},
    "config": {"type": "str"},
    "corpus": {"type": "list", "elements": "str"},
    "cpus_per_node": {"type": "int"},
    "gpus_per_node": {"type": "int"},
    "kind": {"type": "str", "choices": list(KINDS)},
    "nodes": {"type": "int"},
    "partition": {"type": "str"},
    "settings": {"type": "list", "elements": "str"},
    "time": {"type": "str"},
}
"""Options of a stage, as an argument spec."""
LEAST = {"cpus_per_node": 1, "gpus_per_node": 0, "nodes": 1}
NAME = re.compile("[a-z][a-z0-9-]{0,30}")
"""Names of stages, which are also the names of jobs and scripts."""


def stage_problems(stages: Any) -> list[str]:
    """Returns the problems in `slurm_jobs_stages`; formats are validated elsewhere.

    `pretrain` always exists: it starts from scratch. Every other stage comes `after` another one.
    """
    if not isinstance(stages, Mapping):
        return ["must be a dictionary: {STAGE: {config: …, after: …}}"]
    found = [f"{name}: {text}" for name, about in stages.items() for text in _problems(str(name), about, stages)]
    return found or [f"{name}: comes after itself: {' → '.join(path)}" for name, path in _circles(stages)]


def _problems(name: str, about: Any, stages: Mapping[str, Any]) -> Iterator[str]:
    if not NAME.fullmatch(name):
        yield "its name must be 1 to 31 lowercase letters, digits or '-', starting with a letter"
    if not isinstance(about, Mapping):
        yield "must be a dictionary: {config: …, after: …}"
        return
    kind = about.get("kind", name)
    if kind not in KINDS:
        yield f"unknown stage: rename it {', '.join(KINDS)}, or set its kind to one of these"
    yield from ArgumentSpecValidator(OPTIONS).validate(dict(about)).error_messages
    for option, about_option in OPTIONS.items():
        # YAML parses 1:30:00 as the number 5400.
        if about_option["type"] == "str" and not isinstance(about.get(option, ""), str):
            yield f"{option} is {about[option]}: must be text: put it in quotes"
    for option, least in LEAST.items():
        if isinstance(about.get(option), int) and about[option] < least:
            yield f"{option} is {about[option]}: expected {least} or more"
    if kind == "pretrain":
        if "after" in about:
            yield f"after is {about['after']}: pretraining starts from scratch, remove it"
        return
    if not about.get("config") and kind != "promote":
        yield "config is missing: set it to a file below the image's configs"
    if "after" not in about:
        yield "after is missing: set it to the stage whose model is the input"
    elif about["after"] not in {"pretrain", *stages}:
        yield f"after is {about['after']}: no such stage"


def _circles(stages: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yields one stage of each cycle with its path."""
    seen: set[str] = set()
    for name in stages:
        path = [name]
        while (parent := stages.get(path[-1], {}).get("after")) and parent not in path:
            path.append(parent)
        if parent == name and name not in seen:
            seen |= set(path)
            yield name, [name, *path[::-1]]


def ordered_stages(stages: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns every stage with all its options, sorted by dependency.

    A stage without training is one task on one node unless it sets otherwise.
    """
    if found := stage_problems(stages):
        raise AnsibleFilterError(f"slurm_jobs_stages: {'; '.join(found)}")
    complete = {}
    for name, about in {"pretrain": {}, **stages}.items():
        kind = about.get("kind", name)
        single = {} if kind in TRAINING else {"nodes": 1}
        given = ArgumentSpecValidator(OPTIONS).validate(dict(about)).validated_parameters
        chosen = {option: value for option, value in given.items() if value is not None}
        empty = {"after": "", "alias": "champion", "config": "", "settings": []}
        complete[name] = {**empty, **defaults, **single, **chosen, "name": str(name), "kind": str(kind)}
    ordered: list[dict[str, Any]] = []
    _place("", complete, ordered)
    return ordered


def _place(parent: str, stages: Mapping[str, dict[str, Any]], ordered: list[dict[str, Any]]) -> None:
    """Appends the stages that come after one, each followed by its own."""
    for name, about in stages.items():
        if about["after"] == parent:
            ordered.append(about)
            _place(name, stages, ordered)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"ordered_stages": ordered_stages, "stage_problems": stage_problems}
