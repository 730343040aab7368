"""The model of a run, spread over its ranks."""

from __future__ import annotations

import torch

from ictx.model import ModelConfig, Transformer
from ictx.parallel import parallelize
from ictx.train.config import LoopConfig
from ictx.train.ranks import Ranks


def sharded_model(config: ModelConfig, loop: LoopConfig, ranks: Ranks) -> Transformer:
    """Returns the model with the seed's weights, spread over all ranks."""
    with torch.device("meta"):
        model = Transformer(config)
    half = ranks.device.type == "cuda" and loop.dtype == "bfloat16"
    parallelize(
        model,
        ranks.mesh,
        dtype=torch.bfloat16 if half else None,
        mode=loop.recompute,
        layers=loop.recompute_layers,
        compiled=loop.compile,
        context=ranks.context,
        offload=loop.offload,
    )
    # Only now is memory taken, on each rank for its own shards.
    model.to_empty(device=ranks.device)
    model.init_weights(loop.seed)
    return model
