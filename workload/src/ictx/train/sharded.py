"""The sharded model of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ictx.model import ModelConfig, Transformer
from ictx.model.transformer import Layer
from ictx.parallel import float8, memory, parallelize
from ictx.train.config import LoopConfig
from ictx.train.lora import adapt, init_adapter
from ictx.train.ranks import Ranks


def sharded_model(config: ModelConfig, loop: LoopConfig, ranks: Ranks) -> Transformer:
    """Returns the model, sharded over all ranks, with weights initialized from the seed."""
    with torch.device("meta"):
        model = Transformer(config)
        if loop.lora:
            adapt(model, loop.lora)
    model.z_loss_weight = loop.z_loss
    if loop.fp8 != "none":
        float8.check(loop.fp8, ranks.device)
        float8.convert(model, loop.fp8)
    mode: str | Sequence[str] = loop.recompute
    if mode == "auto":
        mode = automatic(model, loop, ranks)
    half = ranks.device.type == "cuda" and loop.dtype == "bfloat16"
    parallelize(
        model,
        ranks.mesh,
        dtype=torch.bfloat16 if half else None,
        mode=mode,
        layers=loop.recompute_layers,
        compiled=loop.compile,
        context=ranks.context,
        offload=loop.offload,
    )
    # Memory is allocated only now, on each rank for its own shards.
    model.to_empty(device=ranks.device)
    model.init_weights(loop.seed)
    if loop.lora:
        init_adapter(model, loop.seed)
    return model


def automatic(model: Transformer, loop: LoopConfig, ranks: Ranks) -> Sequence[str]:
    """Returns each layer's recomputation mode for `recompute: auto`, equal on all ranks; prints the reason."""
    if ranks.device.type != "cuda":
        ranks.say("recompute auto: selective in all layers (no GPU)")
        return ["selective"] * sum(isinstance(module, Layer) for module in model.modules())
    parts, size = ranks.part[1], 2 if loop.dtype == "bfloat16" else 4
    tokens, shards = loop.batch_size * loop.sequence_length // parts, ranks.mesh.size(ranks.mesh.ndim - 1)
    work = memory.Work(tokens, shards, parts, size, loop.compile, loop.accumulate > 1, loop.reduce_once)
    # The minimum over ranks, because all ranks must run the same collectives in the same order.
    left = -ranks.largest(-available(ranks.device))[0]
    found = memory.choose(model, work, left - memory.SPARE)
    fits = "of" if found.need <= left - memory.SPARE else "MORE THAN"
    ranks.say(f"recompute auto: {found}, {fits} the {left / 1e9:.1f} GB left, less {memory.SPARE / 1e9:.0f} to spare")
    return found.modes


def available(device: torch.device) -> float:
    """Returns the bytes of a GPU that this process can still allocate, including reserved but unused ones."""
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device)
    return min(free + held, allowed) - used
