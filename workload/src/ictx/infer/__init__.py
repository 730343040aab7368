"""Inference: the latent cache and attention to it, the captured decode step, generation."""
