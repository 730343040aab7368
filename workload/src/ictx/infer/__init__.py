"""Inference: the latent cache and attention to it, the captured decode step, generation."""

from ictx.infer.cache import LatentCache

__all__ = ["LatentCache"]
