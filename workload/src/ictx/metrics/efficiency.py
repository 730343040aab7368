"""Model FLOPS utilisation: the operations that a step needs, of what the hardware could do in that time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ictx.model import ModelConfig

# Dense peak of bfloat16 (float16 on Turing), FLOP/s, from NVIDIA's data sheets; without sparsity.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "T4": 65e12}


def flops_per_token(config: ModelConfig, parameters: int, sequence_length: int) -> float:
    """Returns the operations of forward and backward for one token of a causal window.

    Six for each weight that is multiplied (all but the embedding's lookup), and three times the forward pass of the
    attention, in which a token sees half of the window on average (PaLM, arXiv:2204.02311, appendix B).
    """
    multiplied = parameters - config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 6.0 * multiplied + 3.0 * config.num_hidden_layers * width * sequence_length


def peak_flops(device: torch.device) -> float | None:
    """Returns what one device can do a second, or None where that is not known (such as on a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def model_flops_utilisation(tokens_per_second: float, per_token: float, peak: float | None) -> Mapping[str, float]:
    """Returns the record's field `mfu`, 0 to 1; nothing where the peak of all devices together is not known."""
    return {"mfu": tokens_per_second * per_token / peak} if peak else {}
