"""Linear layers with products in fp8 (formats: arXiv:2209.05433), using torchao's float8 training.

The dtypes of weights, gradients and checkpoints do not change; both factors of a product are scaled and cast before it.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import torch
from torch import nn

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.model import Transformer

LOWEST = {"tensorwise": 89, "rowwise": 90, "rowwise_with_gw_hp": 90}
"""Lowest compute capability by torchao's recipe: one scale per tensor, or per row; the last one computes gradients of
weights in bfloat16."""
RECIPES = tuple(LOWEST)
TORCHAO = "0.18.0"
"""Version pinned in requirements/cuda-fp8.txt, tested with the pinned PyTorch."""


def check(recipe: str, device: torch.device) -> None:
    """Raises UserError if a device does not support a recipe, or torchao is missing; called before loading anything."""
    lowest, found, setting = LOWEST[recipe], dispatch.capability(device), f"train.fp8 is {recipe}"
    remedy = "or --set train.fp8=none"
    if found < lowest:
        here = f"this GPU has {found / 10}" if found else "there is no NVIDIA GPU here"
        raise UserError(f"{setting}: it needs compute capability {lowest / 10}, {here}: use another GPU, {remedy}")
    try:
        version: str | None = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != TORCHAO:
        lacking = f"torchao {TORCHAO} is not installed{f', but {version}' if version else ''}"
        raise UserError(f"{setting}: {lacking}: install requirements/cuda-fp8.txt, {remedy}")


def convert(model: Transformer, recipe: str, *, emulated: bool = False) -> None:
    """Replaces the linear modules of all layers, in place; names, shapes and sharding of weights do not change.

    Excludes the head, routers, routed experts, and modules whose widths are not multiples of 16. Products outside the
    module's forward stay in bfloat16: `kv_b_proj` under context parallelism, feed-forward layers of many tokens.

    Args:
        emulated: emulate fp8 values, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulated)

    def fits(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and module.in_features % 16 == module.out_features % 16 == 0

    for layers in (model.model.layers, model.mtp):
        convert_to_float8_training(layers, config=config, module_filter_fn=fits)
