"""Model FLOPS utilisation: the floating-point operations of a step relative to the hardware's peak in that time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ictx.model import ModelConfig
from ictx.model.describe import active_parameters

# Dense peak (no sparsity) in bfloat16 (float16 on Turing), FLOP/s, from NVIDIA's data sheets.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "T4": 65e12}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward per token."""

    weights: float
    """6 per weight that a token is multiplied with: active experts only, without the embedding lookup."""
    attention: float
    """Three times the forward pass of scores and values, without a causal mask."""

    @property
    def causal(self) -> float:
        """With a causal mask: a token attends to half of the window on average (PaLM, arXiv:2204.02311, appendix B)."""
        return self.weights + self.attention / 2

    @property
    def full(self) -> float:
        """Without a causal mask, the convention of torchtitan and Megatron-LM."""
        return self.weights + self.attention


def flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """Returns the operations of a training step per token; multi-token prediction adds a layer and another head."""
    multiplied, layers = active_parameters(config), config.num_hidden_layers
    if config.num_nextn_predict_layers:
        multiplied += active_parameters(config, further=True) + config.vocab_size * config.hidden_size
        layers += config.num_nextn_predict_layers
    width = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return Flops(6.0 * multiplied, 6.0 * layers * width * sequence_length)


def peak_flops(device: torch.device) -> float | None:
    """Returns a device's peak in FLOP/s; None if unknown (for example on a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def model_flops_utilisation(tokens_per_second: float, flops: Flops, peak: float | None) -> dict[str, float]:
    """Returns `mfu_causal` and `mfu` (0 to 1), computed with `Flops.causal` and `Flops.full`.

    Empty if `peak` (FLOP/s) is unknown.
    """
    if not peak:
        return {}
    return {"mfu_causal": tokens_per_second * flops.causal / peak, "mfu": tokens_per_second * flops.full / peak}
