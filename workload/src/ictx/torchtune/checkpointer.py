"""Reads the export that `tune run` starts from, and writes its results as exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ictx.model.hf import load_pretrained, write_pretrained
from ictx.model.hf_config import read_hf_config

MODEL = "model"
"""torchtune's key for the weights."""
RECIPE_STATE = "recipe_state.pt"


class Checkpointer:
    """torchtune's checkpointer: reads an export, and writes one per epoch."""

    def __init__(
        self,
        checkpoint_dir: str,
        output_dir: str,
        recipe_checkpoint: str | None = None,
        should_load_recipe_state: bool = False,
        **_: Any,
    ) -> None:
        """Args: `recipe_checkpoint` is an interrupted run's file with optimizer state and progress."""
        self._from, self._to = Path(checkpoint_dir), Path(output_dir)
        self._recipe = Path(recipe_checkpoint or self._to / RECIPE_STATE) if should_load_recipe_state else None

    def load_checkpoint(self, **_: Any) -> dict[str, Any]:
        """Returns the weights and, for a resumed run, its state. Raises UserError if the export is invalid."""
        state: dict[str, Any] = {MODEL: load_pretrained(self._from).state_dict()}
        if self._recipe:
            state |= torch.load(self._recipe, weights_only=True)
        return state

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, **_: Any
    ) -> None:
        """Writes `epoch_N`, an export for `ictx` and transformers, with the tokenizer of the initial export."""
        config, weights = read_hf_config(self._from)[0], state_dict[MODEL]
        write_pretrained(self._to / f"epoch_{epoch}", config, weights, self._from, weights["lm_head.weight"].dtype)
        if intermediate_checkpoint:
            rest = {name: value for name, value in state_dict.items() if name != MODEL}
            torch.save(rest, self._to / RECIPE_STATE)
