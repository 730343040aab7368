"""Optimizers and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ictx.model import Transformer
from ictx.train.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns the learning rate of a step (1 to `steps`): a linear warm-up, then a decay to the final share.

    `cosine` is half a cosine; `wsd` is constant and decays as 1 - √x in the last steps (arXiv:2405.18392, section 3).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "wsd":
        decay = config.decay_steps or max(steps // 10, 1)
        height = 1 - math.sqrt(max(step - (steps - decay), 0) / decay)
    else:
        done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        height = (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * (config.final_share + (1 - config.final_share) * height)


def adamw(weights: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Returns AdamW, fused on GPUs, without weight decay of norms."""
    matrices: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for weight in weights:
        (matrices if weight.ndim > 1 else norms).append(weight)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    betas, fused = (config.beta1, config.beta2), device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def new_optimizers(model: Transformer, config: OptimizerConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """Returns AdamW, or Muon (arXiv:2502.16982) for the layers' matrices and AdamW for all other weights.

    Muon's updates are scaled to AdamW's RMS, so that learning rate and weight decay are the same. AdamW trains
    embedding, head and experts (whose weights have three dimensions).
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if config.name == "adamw":
        return [adamw(trained, config, device)]
    layers = {weight for part in (model.model.layers, model.mtp) for weight in part.parameters() if weight.ndim == 2}
    matrices = [weight for weight in trained if weight in layers]
    rest = [weight for weight in trained if weight not in layers]
    muon = torch.optim.Muon(matrices, config.learning_rate, config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(rest, config, device)]
