"""Validates an adapter before vLLM loads it, because vLLM silently ignores unsupported parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ictx.download import STATE_FILE
from ictx.errors import UserError
from ictx.registry import ModelRef

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter in PEFT's format."""
BASE = "base.json"
"""File beside them with the checksums of the weights on which the adapter was trained."""
ABSORBED = "kv_b_proj"
"""The projection that vLLM's latent attention absorbs into queries and outputs at load time: an adapter of it is
silently ignored (vLLM 0.32)."""


def check_adapter(ref: ModelRef, directory: Path, base: Path | None = None, rank: int | None = None) -> None:
    """Raises UserError for a broken adapter, one of other weights, or one that vLLM would serve only in part.

    Args:
        base: folder of the served model, written by `ictx pull`.
        rank: maximum rank that the server accepts.
    """
    try:
        config = _read(directory / CONFIG)
        trained = _read(directory / BASE) if base is not None and (directory / BASE).is_file() else None
        with safe_open(directory / WEIGHTS, framework="numpy") as content:
            names = list(content.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{ref} is no adapter: {CONFIG} and {WEIGHTS} are expected ({error})") from error
    if any(f".{ABSORBED}." in name for name in names):
        raise UserError(
            f"{ref} adapts {ABSORBED}, which vLLM's latent attention ignores: train with train.lora.targets without "
            "it, or serve the run's merged export"
        )
    if type(config.get("r")) is not int:
        raise UserError(f"{ref} has no integer r (rank) in its {CONFIG}: register the adapter again")
    if rank is not None and config["r"] > rank:
        raise UserError(f"{ref} has rank {config['r']}, the server accepts {rank}: raise adapters.maxRank")
    if base is not None and trained is not None:
        _check_base(ref, trained, base)


def _read(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises OSError or ValueError."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: no keys and values")
    return content


def _check_base(ref: ModelRef, trained: dict[str, Any], base: Path) -> None:
    state = json.loads((base / STATE_FILE).read_text())
    served = {name: checksum for name, checksum in state["sha256"].items() if name.endswith(".safetensors")}
    if trained.get("sha256") != served:
        now = f"{state['name']}/{state['version']}"
        raise UserError(
            f"{ref} was trained with {trained.get('origin')}, but {now} is served, which has other weights: "
            "serve that version, or train the adapter again"
        )
