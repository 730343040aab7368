"""Evaluations as a stage of a chain: several of one model, set by a configuration, with a common result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.evaluate.results import RESULT_FILE, Result
from ictx.folder import write_whole
from ictx.registry import ModelRef, explained, new_client
from ictx.settings import build, config_path, load_yaml, override, shown

ON_DATA = {"perplexity": ("data", "files", ""), "judge": ("prompts", "prompts", "validation.jsonl")}
"""Evaluations that read the stage's prepared data: the option for it, the option that replaces it, and the file."""


@dataclass(frozen=True)
class FolderConfig:
    """Folder of the results."""

    dir: Path
    """Contains a folder per evaluation, `evals/NAME`, and result.json with the metrics of all."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of a stage of evaluations."""

    init: str
    """The model: models:/NAME/VERSION, models:/NAME@ALIAS or run:/FOLDER."""
    run: FolderConfig
    """Folder of the results."""
    evaluations: dict[str, dict[str, Any]]
    """Options of the commands `ictx eval NAME`, without dashes; environment variables are expanded; {} for none.
    `against: "@ALIAS"` is that version of the same model; it is omitted if there is none, or if it is this version."""
    also: tuple[str, ...] = ()
    """Aliases whose versions are evaluated too, such as the champion, with which the model is compared later."""
    data: dict[str, Any] = field(default_factory=dict)
    """Settings of the text's preparation (`ictx data prepare`), and `dir`, its folder."""

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("evaluations is empty: expected commands of `ictx eval` with their options")


@dataclass(frozen=True)
class Command:
    """A command `ictx eval`."""

    name: str
    model: str
    out: Path
    options: Mapping[str, Any]

    def words(self) -> list[str]:
        """Returns the arguments of `ictx eval`."""
        return [self.name, "--model", self.model, "--out", str(self.out), *_words(self.options)]


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if value is None or value is False:
            continue
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield from (os.path.expandvars(str(each)) for each in (value if isinstance(value, list) else [value]))


def planned(config: EvaluationConfig) -> tuple[ModelRef | None, list[Command]]:
    """Returns the model's version (None if not registered) and the commands, the model's first. Raises UserError."""
    with explained():
        ref, model = _found(config.init)
        behind = _behind(ref, config.run.dir / "aliases.json") if ref else {}
    others = [(f"{alias}-", behind[alias]) for alias in config.also if alias in behind]
    evals = config.run.dir / "evals"
    commands = []
    for prefix, each in [("", model), *others]:
        for name, given in config.evaluations.items():
            options = {"models": evals / "models", **_on_data(name, given, config.data.get("dir")), **given}
            if (alias := str(given.get("against", ""))).startswith("@"):
                other = behind.get(alias[1:])
                options["against"] = None if other == each else other
            commands.append(Command(name, each, evals / f"{prefix}{name}", options))
    return ref, commands


def _behind(ref: ModelRef, note: Path) -> dict[str, str]:
    """Returns the model's other versions by alias, as at the first start, because an alias can move."""
    if not note.exists():
        aliases = new_client().get_registered_model(ref.name).aliases
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({alias: str(version) for alias, version in aliases.items()}) + "\n")
    noted: dict[str, str] = json.loads(note.read_text())
    return {alias: str(ModelRef(ref.name, version=each)) for alias, each in noted.items() if each != ref.version}


def _on_data(name: str, given: Mapping[str, Any], directory: str | None) -> dict[str, Any]:
    option, other, file = ON_DATA.get(name, ("", "", ""))
    return {option: Path(directory, file)} if option and directory and other not in given else {}


def _found(init: str) -> tuple[ModelRef | None, str]:
    """Returns a version and its URI, or None and a folder."""
    kind, _, place = init.partition(":")
    if kind == "run" and place:
        return None, str(Path(place, "export"))
    if kind != "models":
        raise UserError(f"init is {shown(init)}: expected models:/NAME/VERSION, models:/NAME@ALIAS or run:/FOLDER")
    ref = ModelRef.parse(init)
    ref = ModelRef(ref.name, version=str(ref.find(new_client()).version))
    return ref, str(ref)


def main(name: str, assignments: list[str], run: Callable[[list[list[str]]], int]) -> int:
    """Evaluates a model as configured and writes result.json; returns the exit status. Raises UserError.

    Args:
        run: runs several commands of `ictx eval`, given their arguments; validates all of them first.
    """
    config = build(EvaluationConfig, override(load_yaml(config_path(name)), assignments))
    ref, commands = planned(config)
    if status := run([command.words() for command in commands]):
        return status
    own = commands[: len(config.evaluations)]
    metrics = {
        metric: value for command in own for metric, value in Result.read(command.out / RESULT_FILE).metrics.items()
    }
    about = {"model_name": ref.name if ref else "", "model_version": ref.version if ref else ""}
    write_whole(
        config.run.dir / RESULT_FILE, json.dumps({"stage": "eval", **about, "metrics": metrics}, indent=1) + "\n"
    )
    return 0
