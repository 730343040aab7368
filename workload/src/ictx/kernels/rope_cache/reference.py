"""`mla_rope_cache` in plain PyTorch: the fallback, and the reference in the kernel's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ictx.kernels.layout import LATENT, parts, quantise_groups


def mla_rope_cache(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor, eps: float, stored: str | None
) -> None:
    """Writes normed latents and rotated keys to the cache; computes in float32 (float64 if `x` is)."""
    work, dtype = torch.float64 if x.dtype == torch.float64 else torch.float32, x.dtype
    kept = slots >= 0
    x, cos, sin, slots = x[kept].to(work), cos[kept].to(work), sin[kept].to(work), slots[kept]
    latent, key = x[:, :LATENT], x[:, LATENT:]
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps) * weight.to(work)
    even, odd = key[:, 0::2], key[:, 1::2]
    key = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    where = slots // cache.shape[1], slots % cache.shape[1]
    if stored is None:
        cache[where] = torch.cat([latent, key], -1).to(cache.dtype)
        return
    latents, scales, keys = parts(cache, stored, dtype)
    values, scale = quantise_groups(latent, stored)
    latents.view(torch.uint8)[where] = values.view(torch.uint8)
    scales[where] = scale
    keys[where] = key.to(keys.dtype)
