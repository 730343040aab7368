"""`ictx promote`: sets the version of a registered model that an alias stands for, and vouches for its files."""

from __future__ import annotations

import getpass
import os
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from mlflow import MlflowClient

from ictx.download import Source, fetch_all
from ictx.errors import UserError
from ictx.registry import FORCED_TAG, OVERRULED_TAG, PROMOTED_TAG, ModelRef, format_sums
from ictx.serve.policy import Evaluated, Policy, Refused, check


def only_model(client: MlflowClient) -> str:
    """Returns the name of the only registered model. Raises UserError when there are several, or none."""
    names = sorted(model.name for model in client.search_registered_models())
    if len(names) != 1:
        raise UserError(f"name the model with --model; registered are {', '.join(names) or 'none'}")
    return str(names[0])


def promote(
    client: MlflowClient, version: str, alias: str, model: str = "", policy: Policy | None = None, forced: str = ""
) -> str:
    """Points the alias to a version (a number, or another alias) and returns what was done, in words.

    The version's files are read and compared with what the job logged, or with what an earlier promotion recorded, and
    their checksums are recorded where only promoters write: `ictx pull` compares with them.

    Args:
        policy: what the version's evaluations must show, beside those of the version behind the alias.
        forced: why a version that the policy refuses is promoted all the same; tags of the version keep it.

    Raises UserError naming the version when it does not exist or is damaged, and the models when several are registered
    and none is named; Refused with the metrics and numbers that the policy does not admit.
    """
    model = model or only_model(client)
    ref = ModelRef(model, version=version) if version.isdecimal() else ModelRef(model, alias=version)
    source = Source.find(client, ref)
    before = client.get_registered_model(model).aliases.get(alias)
    if source.promoted and str(before) == source.version:
        return f"models:/{model}@{alias} is version {before} already"
    # From here on the number counts: another may move the alias meanwhile.
    source = replace(source, ref=ModelRef(model, version=source.version))
    lines, tags = _admit(client, source.ref, None if before is None else str(before), policy or Policy(), forced)
    with tempfile.TemporaryDirectory(prefix="ictx-promote-") as folder:
        sums = fetch_all(source, Path(folder))
    if not source.promoted:
        tags[PROMOTED_TAG] = format_sums(sums)
    now = client.get_registered_model(model).aliases.get(alias)
    if now != before:
        raise UserError(f"models:/{model}@{alias} was version {before} and is {now} now: compare again with that one")
    for name, text in tags.items():
        client.set_model_version_tag(model, source.version, name, text)
    client.set_registered_model_alias(model, alias, source.version)
    done = f"models:/{model}@{alias} is version {source.version} now" + (f", was {before}" if before else "")
    return "\n".join([*lines, done])


def _admit(
    client: MlflowClient, ref: ModelRef, champion: str | None, policy: Policy, forced: str
) -> tuple[list[str], dict[str, str]]:
    """Returns what was compared, and the tags that a forced promotion leaves. Raises Refused."""

    def evaluated(ref: ModelRef) -> Evaluated:
        return Evaluated(str(ref), ref.find(client).tags or {})

    # A version that was promoted before, and stands behind the alias, is no champion of itself.
    other = ModelRef(ref.name, version=champion) if champion and champion != ref.version else None
    try:
        lines, overruled = check(policy, evaluated(ref), evaluated(other) if other else None), ""
    except Refused as refusal:
        if not forced:
            raise
        lines, overruled = [], str(refusal)
    if not forced:
        return lines, {}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    tags = {FORCED_TAG: f"{user}, {date}: {forced}"} | ({OVERRULED_TAG: overruled} if overruled else {})
    return [*lines, *([f"overruled: {overruled}"] if overruled else [])], tags
