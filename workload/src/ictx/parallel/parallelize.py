"""`parallelize`: one model on many devices (FSDP2, arXiv:2304.11277)."""

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

    Over a mesh of two axes they are replicated along the first and sharded along the second (HSDP).

    Args:
        model: on the meta device; it takes memory when `to_empty` is called, on each device for its own shards.
        dtype: what is computed in; the weights' own unless given. Gradients are summed over devices in float32.
        mode: what backward computes again, one of `MODES`, or one for each layer, those of the further prediction last.
        layers: layers that do so, the first ones, whose backward comes last; all of them unless given.
        compiled: whether torch.compile makes the kernels of each layer without experts, whose work depends on the data.
        context: ranks that share out the windows.
        offload: whether what the backward keeps of each layer waits in the host's memory.
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
    """Does all of `parallelize` but the sharding."""
    for module in model.modules():
        if isinstance(module, Transformer | LatentAttention | MoeFeedForward):
            module.context = context
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, Layer)):
        if layers is None or number < layers:
            recompute(layer, mode if isinstance(mode, str) else mode[number], offload)
        if compiled and isinstance(layer.mlp, FeedForward):
            layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
