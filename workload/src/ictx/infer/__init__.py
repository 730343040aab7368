"""Inference: latent cache, cached attention, decode step in a CUDA graph, generation."""
