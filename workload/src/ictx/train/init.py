"""A run's initial model (`init`): resolved once to a version, verified, and kept in the run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ictx.data.tokenizer import TOKENIZER_CONFIG_FILE, read_tokenizer, special_text
from ictx.download import Source, fetch_all, held_version, write_state
from ictx.errors import UserError, printable
from ictx.folder import write_whole
from ictx.manifest import Entry, Unusable, check_files, check_names, check_owner, hash_files, list_files, read_json
from ictx.model import ModelConfig, Transformer
from ictx.model.hf import load_pretrained
from ictx.model.hf_config import read_hf_config, read_object
from ictx.registry import SUMS_FILE, ModelRef, explained, read_sums
from ictx.settings import shown, typed
from ictx.track.mlflow import new_client, patiently
from ictx.train.config import TRAINING_ONLY
from ictx.train.ranks import on_first

NOTE, FOLDER = "init.json", "init"
"""File in a run's folder with the version that `init` was resolved to, and folder with the model's files."""
NOTED = ("init", "origin", "name", "version", "run_id")
"""String fields of the note and of `Parent`."""
RESULT = ("model_name", "model_version", "mlflow_run_id")
"""The corresponding fields of result.json."""
EXPORT = "export"
"""Folder of a run with its exported model."""


@dataclass(frozen=True)
class Parent:
    """An initial model, complete and verified in the run's folder."""

    init: str
    """Value of the setting: `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `run:/FOLDER`."""
    origin: str
    """What it was resolved to when the run started: `models:/NAME/VERSION` or `run:/FOLDER`."""
    name: str
    """Registered model; empty if it is not registered."""
    version: str
    """Registered version; empty if it is not registered."""
    run_id: str
    """MLflow run that trained it; empty if unknown."""
    directory: Path
    """Folder with the files in the format of `ictx.model.hf`."""
    config: ModelConfig
    """Model configuration."""

    @property
    def registered(self) -> str:
        """`NAME/VERSION`, or the origin if it is not registered."""
        return f"{self.name}/{self.version}" if self.version else self.origin

    @property
    def end_of_text(self) -> str:
        """The tokenizer's end-of-text token; empty if its configuration has none."""
        path = self.directory / TOKENIZER_CONFIG_FILE
        return special_text(read_object(path).get("eos_token")) or "" if path.exists() else ""

    def check_tokenizer(self, directory: Path) -> None:
        """Raises UserError unless the data in a folder was prepared with this model's tokenizer."""
        if read_tokenizer(directory).to_str() != read_tokenizer(self.directory).to_str():
            raise UserError(
                f"{directory} has another tokenizer than {self.init}: prepare it with data.tokenizer={self.directory}"
            )

    def load(self, model: Transformer) -> None:
        """Loads these weights into a model, which may be sharded; every rank calls it, the first one reads the files.

        Raises UserError with the file and the tensor that is invalid.
        """
        weights: dict[str, Any] = {}
        on_first(lambda: weights.update(load_pretrained(self.directory, dtype=torch.float32).state_dict()))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        keys = set_model_state_dict(model, weights, options=options)
        # Only adapters' weights are missing in the files.
        assert not keys.unexpected_keys and all(".lora_" in name for name in keys.missing_keys)


def take(init: str, run: Path, patience: float = 0.0) -> Parent:
    """Copies or downloads a run's initial model to the run's folder `run`, verifies it, and returns it.

    `init` is resolved at the first start and the result is saved, so that later starts are not affected by a changed
    alias, and need neither the server nor the other run's folder. One process at a time may call it.

    Args:
        patience: seconds to wait for a tracking server that does not respond.

    Raises UserError if the model does not exist, is damaged or another user's, or the server does not respond.
    """
    with explained():
        return _taken(init, run, patience)


def _taken(init: str, run: Path, patience: float) -> Parent:
    note, directory = run / NOTE, run / FOLDER
    found = _noted(note)
    if found and found["init"] != init:
        raise UserError(
            f"init is {shown(init)}, but {run} was started with {found['init']}: use that, or another run.dir"
        )
    if not found:
        found = patiently(lambda: _resolved(init), patience)
        _write(note, found)
    if directory.exists():
        check_owner(directory)
    if held_version(directory) != _key(found):
        sums = _brought(found, _draft(directory), patience)
        if found.setdefault("sha256", sums) != sums:
            raise UserError(f"{found['origin']} has changed since {run} was started: use another run.dir")
        _write(note, found)
        if directory.exists():
            shutil.rmtree(directory)
        _draft(directory).rename(directory)
    config = read_hf_config(directory)[0]
    return Parent(**{name: found[name] for name in NOTED}, directory=directory, config=config)


def _noted(note: Path) -> dict[str, Any] | None:
    """Returns an earlier start's note, None without one. Raises UserError if another user may have written it."""
    if not note.exists():
        return None
    check_owner(note)
    found = read_json(note)
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in NOTED):
        raise UserError(f"{note} is not a run's {NOTE}: use another run.dir")
    return found


def _write(note: Path, found: Mapping[str, Any]) -> None:
    write_whole(note, json.dumps(found, indent=1) + "\n")
    note.chmod(0o644)


def _draft(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.part")


def _key(found: Mapping[str, Any]) -> tuple[str, str]:
    """Returns name and version in the folder's state file."""
    return (found["name"], found["version"]) if _is_registered(found["origin"]) else (found["origin"], "")


def _is_registered(origin: str) -> bool:
    return origin.startswith("models:")


def _resolved(init: str) -> dict[str, Any]:
    """Resolves `init`; returns the content of the note. Raises UserError."""
    kind, _, place = init.partition(":")
    values: tuple[str, ...]
    if kind == "models":
        ref = ModelRef.parse(init)
        found = ref.find(new_client())
        version = str(found.version)
        origin = str(ModelRef(ref.name, version=version))
        values = origin, ref.name, version, found.run_id or ""
    elif kind == "run" and place:
        folder = Path(place).resolve()
        result = _result(folder)
        values = f"run:{folder}", *(str(result.get(name) or "") for name in RESULT)
    else:
        raise UserError(f"init is {shown(init)}: expected models:/NAME/VERSION, models:/NAME@ALIAS or run:/FOLDER")
    return dict(zip(NOTED, (init, *values), strict=True))


def _result(run: Path) -> dict[str, Any]:
    """Returns a run's result.json. Raises UserError unless it belongs to this user or root."""
    export, path = run / EXPORT, run / "result.json"
    try:
        for each in (run, export, path):
            check_owner(each, {0})
        result = read_json(path)
    except Unusable as error:
        raise UserError(f"init is run:{run}, which is not a completed run of yours: {error}") from error
    return result if isinstance(result, dict) else {}


def _brought(found: Mapping[str, Any], draft: Path, patience: float) -> dict[str, str]:
    """Downloads or copies the model's files to `draft`; returns path → SHA-256. Raises UserError."""
    if _is_registered(found["origin"]):
        ref = ModelRef(found["name"], version=found["version"])
        _say(f"downloading {ref}")
        return patiently(lambda: fetch_all(Source.find(new_client(), ref), draft, _say), patience)
    export = Path(found["origin"].partition(":")[2], EXPORT)
    _say(f"copying {export}")
    names = list_files(export)
    for name in names:
        check_owner(export / name, {0})
    if SUMS_FILE in names:
        sums = read_sums((export / SUMS_FILE).read_text())
        check_names(export, {*sums, SUMS_FILE})
    else:
        sums = {name: entry.sha256 for name, entry in hash_files(export, names).items()}
    with suppress(FileNotFoundError):
        shutil.rmtree(draft)
    for name in sums:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(export / name, draft / name, follow_symlinks=False)
    # The copies are verified, because the export may have changed meanwhile.
    check_files(draft, {name: Entry(checksum) for name, checksum in sums.items()})
    write_state(draft, *_key(found), sums)
    return sums


def _say(text: str) -> None:
    """Prints without buffering, because the log is read while the job runs."""
    print(f"init: {printable(text)}", flush=True)


def inherited(parent: Parent, given: Mapping[str, Any], changeable: Collection[str] = ()) -> ModelConfig:
    """Returns the parent's model configuration with the changes in a run's settings (`model`).

    Settings need not repeat the parent's. Raises UserError for one that differs, unless it is in `changeable` or
    affects only training. If YaRN changes, max_position_embeddings is adjusted.
    """
    before = asdict(parent.config)
    whole = {
        name: {**before[name], **value} if isinstance(value, dict) and isinstance(before.get(name), dict) else value
        for name, value in given.items()
    }
    try:
        wanted = typed(ModelConfig, whole, "model.")
        if (yarn := wanted.get("yarn")) and "yarn" in changeable:
            wanted.setdefault("max_position_embeddings", round(yarn.factor * yarn.original_max_position_embeddings))
        for name, now, known in _differences(wanted, before):
            if name not in changeable or now is None:
                raise UserError(f"model.{name} is {shown(now)}, but {parent.init} has {shown(known)}: leave it out")
        return replace(parent.config, **wanted)
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def _differences(now: Mapping[str, Any], before: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields settings that differ, with both values, except those that affect only training."""
    for name, value in now.items():
        known, path = before[name], f"{prefix}{name}"
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, dict) and isinstance(known, dict):
            yield from _differences(value, known, f"{path}.")
        elif value != known and path not in TRAINING_ONLY:
            yield path, value, known
