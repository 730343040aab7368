"""The same sizes in transformers, spread by the same FSDP2: what `ictx bench train` measures beside ours."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ictx.model import ModelConfig
from ictx.model.hf_config import to_hf


def peer(config: ModelConfig, mesh: DeviceMesh, device: torch.device, *, compiled: bool) -> nn.Module:
    """Returns DeepseekV3ForCausalLM with random weights: SDPA, and every layer computed again in the backward."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    content = to_hf(config, torch.float32) | {"attn_implementation": "sdpa"}
    with torch.device("meta"):
        model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**content))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        if compiled:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, config.initializer_range) if weight.ndim > 1 else weight.fill_(1.0)
        # Rotary frequencies are buffers: to_empty left nothing in them.
        rotary = model.model.rotary_emb
        for name, buffer in type(rotary)(model.config).named_buffers():
            getattr(rotary, name).copy_(buffer)
    return cast(nn.Module, model)
