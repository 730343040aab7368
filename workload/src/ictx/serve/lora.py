"""What an adapter must be for vLLM to serve it: checked before it is loaded, as vLLM would leave parts out silently."""

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
"""Beside them: the checksums of the weights that the adapter was trained with."""
ABSORBED = "kv_b_proj"
"""The projection that vLLM's latent attention multiplies into queries and outputs when it loads a model: what an
adapter adds to it is left out, without a word (vLLM 0.32)."""


def check_adapter(ref: ModelRef, directory: Path, base: Path | None = None, rank: int | None = None) -> None:
    """Raises UserError naming what is wrong: no adapter, one for other weights, or one that vLLM serves in part.

    Args:
        base: folder of the model that is served, as `ictx pull` left it.
        rank: largest that the server takes.
    """
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
        with safe_open(directory / WEIGHTS, framework="numpy") as content:
            names = list(content.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{ref} is no adapter: {CONFIG} and {WEIGHTS} are expected ({error})") from error
    if any(f".{ABSORBED}." in name for name in names):
        raise UserError(
            f"{ref} adapts {ABSORBED}, which vLLM's latent attention leaves out: train with train.lora.targets without "
            "it, or serve the run's merged export"
        )
    if rank is not None and config.get("r", 0) > rank:
        raise UserError(f"{ref} has rank {config['r']}, the server takes {rank}: raise adapters.maxRank")
    if base is not None and (directory / BASE).is_file():
        _check_base(ref, json.loads((directory / BASE).read_text()), base)


def _check_base(ref: ModelRef, trained: dict[str, Any], base: Path) -> None:
    state = json.loads((base / STATE_FILE).read_text())
    served = {name: checksum for name, checksum in state["sha256"].items() if name.endswith(".safetensors")}
    if trained.get("sha256") != served:
        now = f"{state['name']}/{state['version']}"
        raise UserError(
            f"{ref} was trained with {trained.get('origin')}, and {now} is served, whose weights are others: "
            "serve that version, or train the adapter again"
        )
