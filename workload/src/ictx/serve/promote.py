"""`ictx promote`: sets an alias of a registered model to a version, and records its verified checksums."""

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
    """Returns the name of the only registered model. Raises UserError if there are several, or none."""
    names = sorted(model.name for model in client.search_registered_models())
    if len(names) != 1:
        raise UserError(f"set --model; registered models: {', '.join(names) or 'none'}")
    return str(names[0])


def promote(
    client: MlflowClient, version: str, alias: str, model: str = "", policy: Policy | None = None, forced: str = ""
) -> str:
    """Sets the alias to a version (a number, or another alias); returns a message.

    Verifies the version's files with the checksums that the job logged, or that an earlier promotion recorded, and
    records them in a tag that only promoters can write, which `ictx pull` verifies.

    Args:
        policy: requirements on the version's evaluations, also relative to the alias's current version.
        forced: reason to promote a version that the policy rejects; recorded in the version's tags.

    Raises UserError if the version does not exist or is damaged, or `model` is not set and there are several; Refused
    with the comparisons that failed.
    """
    model = model or only_model(client)
    ref = ModelRef(model, version=version) if version.isdecimal() else ModelRef(model, alias=version)
    source = Source.find(client, ref)
    before = client.get_registered_model(model).aliases.get(alias)
    if source.promoted and str(before) == source.version:
        return f"models:/{model}@{alias} is version {before} already"
    # Use the number from here on, because somebody may change the alias meanwhile.
    source = replace(source, ref=ModelRef(model, version=source.version))
    lines, tags = _admit(client, source.ref, None if before is None else str(before), policy or Policy(), forced)
    with tempfile.TemporaryDirectory(prefix="ictx-promote-") as folder:
        sums = fetch_all(source, Path(folder))
    if not source.promoted:
        tags[PROMOTED_TAG] = format_sums(sums)
    now = client.get_registered_model(model).aliases.get(alias)
    if now != before:
        raise UserError(f"models:/{model}@{alias} changed from version {before} to {now} meanwhile: run promote again")
    for name, text in tags.items():
        client.set_model_version_tag(model, source.version, name, text)
    client.set_registered_model_alias(model, alias, source.version)
    done = f"models:/{model}@{alias} is version {source.version} now" + (f", was {before}" if before else "")
    return "\n".join([*lines, done])


def _admit(
    client: MlflowClient, ref: ModelRef, champion: str | None, policy: Policy, forced: str
) -> tuple[list[str], dict[str, str]]:
    """Returns the comparisons, and the tags of a forced promotion. Raises Refused."""

    def evaluated(ref: ModelRef) -> Evaluated:
        return Evaluated(str(ref), ref.find(client).tags or {})

    # A version is not compared with itself.
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
    return [*lines, *([f"overridden: {overruled}"] if overruled else [])], tags
