"""Linear layers that multiply in fp8 (formats: arXiv:2209.05433), by torchao's float8 training.

Weights, gradients and checkpoints stay what they are; both factors of a product are scaled and cast just before it.
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
"""Lowest compute capability by torchao's names: one scale a tensor, or a row; the last computes gradients of weights in
bfloat16."""
RECIPES = tuple(LOWEST)
TORCHAO = "0.18.0"
"""Version that requirements/cuda-fp8.txt locks, tried with the PyTorch that is locked."""


def check(recipe: str, device: torch.device) -> None:
    """Raises UserError where a recipe cannot be used on a device: in one line, before anything is loaded."""
    lowest, found, setting = LOWEST[recipe], dispatch.capability(device), f"train.fp8 is {recipe}"
    remedy = "or --set train.fp8=none"
    if found < lowest:
        here = f"this GPU has {found / 10}" if found else "there is no NVIDIA GPU here"
        raise UserError(f"{setting}: it needs compute capability {lowest / 10}, {here}: another GPU, {remedy}")
    try:
        version: str | None = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != TORCHAO:
        lacking = f"torchao {TORCHAO} is not installed{f', but {version}' if version else ''}"
        raise UserError(f"{setting}: {lacking}: install requirements/cuda-fp8.txt, {remedy}")


def convert(model: Transformer, recipe: str, *, emulated: bool = False) -> None:
    """Replaces the linear layers of all layers, in place; names, shapes and sharding of weights stay.

    Not the head, routers and routed experts, nor layers whose widths are no multiples of 16. Where the product is not
    the module's own it stays in bfloat16: `kv_b_proj` under context parallelism, feed-forward layers of many tokens.

    Args:
        emulated: compute with what fp8 would hold, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulated)

    def fits(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and module.in_features % 16 == module.out_features % 16 == 0

    for layers in (model.model.layers, model.mtp):
        convert_to_float8_training(layers, config=config, module_filter_fn=fits)
