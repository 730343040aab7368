"""Exports, there and back: what `tune run` begins with and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ictx.model.hf import load_pretrained, write_pretrained
from ictx.model.hf_config import read_hf_config

MODEL = "model"
"""torchtune's key of the weights."""
RECIPE_STATE = "recipe_state.pt"


class Checkpointer:
    """Reads an export, and writes one for each epoch."""

    def __init__(
        self,
        checkpoint_dir: str,
        output_dir: str,
        recipe_checkpoint: str | None = None,
        should_load_recipe_state: bool = False,
        **_: Any,
    ) -> None:
        """Args: `recipe_checkpoint` is the file of optimizer and progress that an interrupted run left."""
        self._from, self._to = Path(checkpoint_dir), Path(output_dir)
        self._recipe = Path(recipe_checkpoint or self._to / RECIPE_STATE) if should_load_recipe_state else None

    def load_checkpoint(self, **_: Any) -> dict[str, Any]:
        """Returns the weights and, for a run that goes on, its state. Raises UserError."""
        state: dict[str, Any] = {MODEL: load_pretrained(self._from).state_dict()}
        if self._recipe:
            state |= torch.load(self._recipe, weights_only=True)
        return state

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, **_: Any
    ) -> None:
        """Writes `epoch_N`, an export as `ictx` and transformers read it, with the tokenizer of the one before."""
        config, weights = read_hf_config(self._from)[0], state_dict[MODEL]
        write_pretrained(self._to / f"epoch_{epoch}", config, weights, self._from, weights["lm_head.weight"].dtype)
        if intermediate_checkpoint:
            rest = {name: value for name, value in state_dict.items() if name != MODEL}
            torch.save(rest, self._to / RECIPE_STATE)
