"""`ictx pull`: downloads a registered model's files to a folder and verifies them."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from safetensors import SafetensorError, safe_open

from ictx.download import Source, fetch_all, held_version
from ictx.errors import UserError, printable
from ictx.registry import ModelRef

# Sizes that vLLM's MLA supports. With others it starts and passes health checks, but fails at the first request.
SERVABLE = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def pull(
    client: MlflowClient,
    ref: ModelRef,
    target: Path,
    promoted: bool = False,
    check: Callable[[ModelRef, Path], None] | None = None,
) -> str:
    """Downloads the version's files to `target`, which is created only if complete and verified; returns the version.

    Files that an interrupted pull has verified are not downloaded again. A fixed version that exists in `target` needs
    no server.

    Args:
        promoted: reject a version that was not promoted.
        check: raises UserError for files that cannot be served; default: `check_servable`.

    Raises UserError with the model and the cause.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.part")
    with _locked(target.with_name(f".{target.name}.lock")), _explained(target):
        held = held_version(target)
        if ref.version and held == (ref.name, ref.version):
            _say(f"{ref} is already in {target}")
            return ref.version
        source = Source.find(client, ref)
        if held == (ref.name, source.version):
            _say(f"{ref} is version {source.version}, already in {target}")
            return source.version
        if promoted and not source.promoted:
            raise UserError(
                f"{ref} is version {source.version}, which was not promoted: "
                f"run ictx promote {source.version} --alias ALIAS --model {ref.name}"
            )
        _say(f"{ref} is version {source.version}, at {source.uri}")
        fetch_all(source, draft, _say)
        (check or check_servable)(ref, draft)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    _say(f"{ref} is complete in {target}")
    return source.version


def check_servable(ref: ModelRef, directory: Path) -> None:
    """Raises UserError for models that a server would fail on later: damaged weights, or unsupported MLA sizes."""
    weights = sorted(directory.rglob("*.safetensors"))
    if not weights:
        raise UserError(f"{ref} has no *.safetensors: it is not an exported model")
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as content:
                content.keys()
        except SafetensorError as error:
            raise UserError(f"{ref}: {file.name} is damaged ({error}): promote another version") from error
    try:
        config: Any = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{ref} has no readable config.json ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{ref} has a config.json without keys and values: promote another version")
    if config.get("model_type") != "deepseek_v3":
        return
    wrong = {name: config.get(name) for name, size in SERVABLE.items() if config.get(name) != size}
    if wrong:
        found = ", ".join(f"{name} {size}" for name, size in wrong.items())
        needed = ", ".join(f"{name} {SERVABLE[name]}" for name in wrong)
        raise UserError(f"{ref} has {found}: vLLM serves latent attention with {needed} only")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock against other pods that share the volume."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another pull to this folder is running: waiting for its lock {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Adds the folder to errors of writes to open files (full disk), which have no file name."""
    try:
        yield
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise UserError(f"cannot write below {target}: {error.strerror}") from error


def _say(text: str) -> None:
    """Prints without buffering, because the log is read while the container runs."""
    print(f"pull: {printable(text)}", flush=True)
