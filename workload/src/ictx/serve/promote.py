"""`ictx promote`: says which version of a registered model an alias stands for."""

from __future__ import annotations

from mlflow import MlflowClient

from ictx.errors import UserError
from ictx.registry import ModelRef


def only_model(client: MlflowClient) -> str:
    """Returns the name of the only registered model. Raises UserError when there are several, or none."""
    names = sorted(model.name for model in client.search_registered_models())
    if len(names) != 1:
        raise UserError(f"name the model with --model; registered are {', '.join(names) or 'none'}")
    return str(names[0])


def promote(client: MlflowClient, version: str, alias: str, model: str = "") -> str:
    """Points the alias to a version (a number, or another alias) and returns what was done, in words.

    Raises UserError naming the version when it does not exist or cannot be served, and the models when several are
    registered and none is named.
    """
    model = model or only_model(client)
    ref = ModelRef(model, version=version) if version.isdecimal() else ModelRef(model, alias=version)
    found = ref.find(client)
    before = client.get_registered_model(model).aliases.get(alias)
    if before == found.version:
        return f"models:/{model}@{alias} is version {found.version} already"
    client.set_registered_model_alias(model, alias, found.version)
    return f"models:/{model}@{alias} is version {found.version} now" + (f", was {before}" if before else "")
