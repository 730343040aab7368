"""`parallelize`: one model on many devices (FSDP2, arXiv:2304.11277)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ictx.model.moe import FeedForward
from ictx.model.transformer import Layer, Transformer
from ictx.parallel.recompute import recompute


def parallelize(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None,
    mode: str = "none",
    layers: int | None = None,
    compiled: bool = False,
) -> Transformer:
    """Shards a model's weights over all devices of a mesh, layer by layer, and returns it.

    Args:
        model: on the meta device; it takes memory when `to_empty` is called, on each device for its own shards.
        dtype: what is computed in; the weights' own unless given. Gradients are summed over devices in float32.
        mode: what backward computes again, one of `MODES`.
        layers: layers that do so, the first ones, whose backward comes last; all of them unless given.
        compiled: whether torch.compile makes the kernels of each layer without experts, whose work depends on the data.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotations stay float32
    )
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, Layer)):
        if layers is None or number < layers:
            recompute(layer, mode)
        if compiled and isinstance(layer.mlp, FeedForward):
            layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
    for part in (*model.model.layers, *model.mtp):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
