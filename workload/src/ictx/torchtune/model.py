"""The model with torchtune's calling convention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ictx.model.hf_config import read_hf_config
from ictx.model.transformer import Transformer


class TuneTransformer(Transformer):
    """The model with torchtune's argument names."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Returns the logits of each next token, of shape (batch, sequence, vocab_size).

        Args:
            tokens: integers of shape (batch, sequence), padded on the right.
            mask: given if rows hold several samples (`packed`); its content is derived from `input_pos`.
            input_pos: position of each token in its sample.
        """
        samples = None if mask is None or input_pos is None else (input_pos == 0).cumsum(1)
        return super().forward(tokens, input_pos, document_ids=samples)


def model(checkpoint_dir: str) -> TuneTransformer:
    """Returns a model with an export's configuration; the recipe loads the weights. Raises UserError."""
    return TuneTransformer(read_hf_config(Path(checkpoint_dir))[0])
