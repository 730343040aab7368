"""Sampling of the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.settings import shown


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    temperature: float = 0.0
    """Divisor of the logits; 0: greedy."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens with this total probability."""
    seed: int | None = None
    """Random seed for reproducible sampling, −2⁶³ to 2⁶⁴ − 1; None: random."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}: expected more than 0, and at most 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed is {shown(self.seed)}: expected -{2**63} to {2**64 - 1}")


GREEDY = Sampling()
"""Selects the likeliest token."""


class Sampler:
    """Samples tokens from logits."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits_bv: Tensor) -> Tensor:
        """Returns a token per row, int64 of shape (batch,). Raises UserError if a logit is not finite."""
        sampling = self.sampling
        if not bool(torch.isfinite(logits_bv).all()):
            raise UserError(
                "the model's logits are not finite: its weights are damaged, or too large for their dtype "
                f"({str(logits_bv.dtype).removeprefix('torch.')})"
            )
        if sampling.temperature == 0:
            return logits_bv.argmax(-1)
        # Shifted to at most 0, in float64, so that small temperatures do not overflow the largest logit.
        logits_bv = logits_bv.double() - logits_bv.double().amax(-1, keepdim=True)
        logits_bv = (logits_bv / sampling.temperature).float()
        if sampling.top_k:
            lowest = logits_bv.topk(min(sampling.top_k, logits_bv.shape[-1])).values[:, -1:]
            logits_bv = logits_bv.masked_fill(logits_bv < lowest, -torch.inf)
        ordered, tokens = logits_bv.softmax(-1).sort(-1, descending=True)
        # Include the token that reaches the limit.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        return tokens.gather(1, torch.multinomial(ordered, 1, generator=self.generator)).squeeze(1)
