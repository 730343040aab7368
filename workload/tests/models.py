"""Models small enough for tests, and transformers' models with the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ictx.model import ModelConfig, MoeConfig, Transformer, YarnConfig
from ictx.model.hf import save_pretrained

# Several threads synchronize slowly on a busy machine.
torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
}
YARN = YarnConfig(factor=4, original_max_position_embeddings=64)
MOE = MoeConfig(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)


def small(**changes: Any) -> Transformer:
    """Returns a model in evaluation mode, with router biases large enough to change the selected experts."""
    settings = SMALL | {"max_position_embeddings": 256, "initializer_range": 0.1} | changes
    model = Transformer(ModelConfig(**settings))
    model.init_weights(seed=7)
    generator = torch.Generator().manual_seed(3)
    for router in model.routers:
        router.e_score_correction_bias.uniform_(-0.1, 0.1, generator=generator)
    return model.eval()


def reference_of(model: Transformer) -> Any:
    """Returns transformers' model with these weights, loaded from an export."""
    from transformers import DeepseekV3ForCausalLM  # imported here, since it slows the start of processes

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "hf")
        return DeepseekV3ForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32)
