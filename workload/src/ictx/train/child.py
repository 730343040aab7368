"""Stages that start from a parent model (`init`): extend, sft, dpo."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ictx.errors import UserError
from ictx.parallel import Layout
from ictx.settings import build, typed
from ictx.track.config import DEFAULTS
from ictx.train.config import LoopConfig, RunConfig, StageConfig
from ictx.train.init import Parent, inherited, take
from ictx.train.ranks import Ranks, on_first
from ictx.train.run import begun, conduct
from ictx.train.stage import Stage


class Child:
    """Base class of such stages; `main` creates an instance from the settings and the parent."""

    name = ""
    settings: type[StageConfig] = StageConfig
    changeable: Collection[str] = ()
    """Model settings that may differ from the parent's."""
    remedy = "extend it with `ictx train extend`"
    """Remedy for a context that is too short."""

    def __init__(self, config: Any, parent: Parent) -> None:
        self.config, self.parent = config, parent
        self.vocabulary, self.end_of_text = parent.directory, parent.end_of_text

    @classmethod
    def completed(cls, content: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
        """Returns settings completed from the parent: the model, its registered name, and the experiment.

        Raises UserError for settings that contradict the parent.
        """
        given, model = _typed(cls, content), content.get("model") or {}
        if not isinstance(model, Mapping):
            raise UserError(f"setting model is {model!r}: expected keys and values")
        sizes = inherited(parent, model, cls.changeable)
        loop: LoopConfig | None = given.get("train")
        if loop and loop.sequence_length > sizes.max_position_embeddings:
            raise UserError(
                f"train.sequence_length is {loop.sequence_length}, longer than the parent's context of "
                f"{sizes.max_position_embeddings} tokens ({parent.init}): {cls.remedy}"
            )
        defaults = {"model_name": parent.name, "experiment": cls.name}
        return {**content, "model": asdict(sizes), "run": {**defaults, **content.get("run", {})}}

    def conduct(self, ranks: Ranks, directory: Path) -> int:
        """Runs the stage with ranks that have joined: see `ictx.train.run.main`."""
        return conduct(cast("Stage", self), self.config, ranks, directory)


def main(kind: type[Child], content: Mapping[str, Any]) -> int:
    """Starts or resumes a run of such a stage with settings as plain values: see `ictx.train.run.main`.

    Also raises UserError if the parent is not available (`ictx.train.init.take`).
    """
    given = _typed(kind, content)
    init, run = given.get("init"), given.get("run", RunConfig())
    if not init:
        raise UserError("init is not set: add --set init=models:/NAME@ALIAS, models:/NAME/VERSION or run:/FOLDER")
    with begun(run, given.get("parallel", Layout()), given.get("track", DEFAULTS)) as (ranks, directory):
        parent = on_first(lambda: take(init, directory, run.tracking_patience))
        config = build(kind.settings, kind.completed(content, parent))
        return kind(config, parent).conduct(ranks, directory)


def _typed(kind: type[Child], content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stage's typed settings, except the model. Raises UserError for invalid ones."""
    return typed(kind.settings, {name: value for name, value in content.items() if name != "model"})
