"""The optimizer, and its learning rate from step to step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ictx.train.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns the rate of step 1 … `steps`: a linear warm-up, then the schedule's way down to the final share.

    `cosine` is half a cosine; `wsd` stays, and goes down as 1 - √ (arXiv:2405.18392, section 3) in the last steps.
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


def new_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Returns AdamW, in one kernel on GPUs; norms do not decay."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=device.type == "cuda")
