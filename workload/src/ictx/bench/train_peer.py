"""Baselines of `ictx bench train`: the same sizes in transformers under FSDP2, and our model under DDP."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ictx.model import ModelConfig, Transformer
from ictx.model.hf_config import to_hf
from ictx.parallel.parallelize import prepare
from ictx.train.config import LoopConfig


def peer(config: ModelConfig, mesh: DeviceMesh, device: torch.device, *, compiled: bool) -> nn.Module:
    """Returns DeepseekV3ForCausalLM with random weights, SDPA and recompute of every layer."""
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
        # Rotary frequencies are buffers, which to_empty leaves uninitialized.
        rotary = model.model.rotary_emb
        for name, buffer in type(rotary)(model.config).named_buffers():
            getattr(rotary, name).copy_(buffer)
    return cast(nn.Module, model)


def replicated(config: ModelConfig, loop: LoopConfig, device: torch.device) -> nn.Module:
    """Returns our model under DistributedDataParallel: float32 weights on each rank, computation in bfloat16.

    Uses autocast, with a bfloat16 residual stream as under FSDP2.
    """
    with torch.device("meta"):
        model = Transformer(config)
    mode, layers, compiled = loop.recompute, loop.recompute_layers, loop.compile
    prepare(model, mode=mode, layers=layers, compiled=compiled, context=None, offload=loop.offload)
    model.to_empty(device=device)
    model.init_weights(loop.seed)
    if device.type == "cuda":
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    # Gradients are views of the buckets, not copies beside them.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)
