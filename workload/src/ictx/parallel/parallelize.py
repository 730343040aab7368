"""`parallelize`: shards a model over devices (FSDP2, arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ictx.model.attention import LatentAttention
from ictx.model.moe import FeedForward, MoeFeedForward
from ictx.model.transformer import Layer, Transformer
from ictx.parallel.communication import observe
from ictx.parallel.context import Context
from ictx.parallel.recompute import recompute


def parallelize(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None,
    mode: str | Sequence[str] = "none",
    layers: int | None = None,
    compiled: bool = False,
    context: Context | None = None,
    offload: bool = False,
) -> Transformer:
    """Shards a model's weights over the devices of a mesh, layer by layer, and returns it.

    Over a mesh of two axes, weights are replicated along the first and sharded along the second (HSDP).

    Args:
        model: on the meta device; `to_empty` then allocates each device's shards.
        dtype: dtype of the computation; default: that of the weights. Gradients are reduced in float32.
        mode: recompute mode, one of `MODES`, or one per layer, MTP layers last.
        layers: number of layers that recompute, the first ones, whose backward pass comes last; default: all.
        compiled: compile dense layers with torch.compile; the work of layers with experts depends on the data.
        context: context-parallel ranks.
        offload: keep saved activations of each layer in host memory.
    """
    prepare(model, mode=mode, layers=layers, compiled=compiled, context=context, offload=offload)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotations stay float32
    )
    for part in (*model.model.layers, *model.mtp):
        observe(fully_shard(part, mesh=mesh, mp_policy=policy), mesh.ndim > 1)
    observe(fully_shard(model, mesh=mesh, mp_policy=policy), mesh.ndim > 1)
    return model


def prepare(
    model: Transformer,
    *,
    mode: str | Sequence[str],
    layers: int | None,
    compiled: bool,
    context: Context | None,
    offload: bool,
) -> None:
    """Does everything in `parallelize` except sharding."""
    for module in model.modules():
        if isinstance(module, Transformer | LatentAttention | MoeFeedForward):
            module.context = context
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, Layer)):
        if layers is None or number < layers:
            recompute(layer, mode if isinstance(mode, str) else mode[number], offload)
        if compiled and isinstance(layer.mlp, FeedForward):
            layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
