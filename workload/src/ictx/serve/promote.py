"""`ictx promote`: says which version of a registered model an alias stands for, and vouches for its files."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient

from ictx.download import Source, fetch_all
from ictx.errors import UserError
from ictx.registry import PROMOTED_TAG, ModelRef, format_sums


def only_model(client: MlflowClient) -> str:
    """Returns the name of the only registered model. Raises UserError when there are several, or none."""
    names = sorted(model.name for model in client.search_registered_models())
    if len(names) != 1:
        raise UserError(f"name the model with --model; registered are {', '.join(names) or 'none'}")
    return str(names[0])


def promote(client: MlflowClient, version: str, alias: str, model: str = "") -> str:
    """Points the alias to a version (a number, or another alias) and returns what was done, in words.

    The version's files are read and compared with what the job logged, or with what an earlier promotion recorded, and
    their checksums are recorded where only promoters write: `ictx pull` compares with them. Raises UserError naming the
    version when it does not exist or is damaged, and the models when several are registered and none is named.
    """
    model = model or only_model(client)
    ref = ModelRef(model, version=version) if version.isdecimal() else ModelRef(model, alias=version)
    source = Source.find(client, ref)
    before = client.get_registered_model(model).aliases.get(alias)
    if source.promoted and str(before) == source.version:
        return f"models:/{model}@{alias} is version {before} already"
    # From here on the number counts: another may move the alias meanwhile.
    source = replace(source, ref=ModelRef(model, version=source.version))
    with tempfile.TemporaryDirectory(prefix="ictx-promote-") as folder:
        sums = fetch_all(source, Path(folder))
    if not source.promoted:
        client.set_model_version_tag(model, source.version, PROMOTED_TAG, format_sums(sums))
    client.set_registered_model_alias(model, alias, source.version)
    return f"models:/{model}@{alias} is version {source.version} now" + (f", was {before}" if before else "")
