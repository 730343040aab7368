"""The part of `ictx kernels tune` for `mla_attention` and `mla_prefill`: their three kernels' tiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ictx.kernels import attention, attention_bench, attention_tuning, build, dispatch
from ictx.kernels.attention_tuning import AttentionConfig, Tiles, attention_config
from ictx.kernels.tune import Kind

TOKENS = 16384
SHIPPED = {
    "forward": ("mla_attention.forward", "mla_prefill.whole", "mla_prefill.part"),
    "keys_values": ("mla_attention.keys_values",),
    "queries": ("mla_attention.queries",),
}
"""What is compiled with each one's tiles."""


def candidates(name: str, tma: bool) -> list[Tiles]:
    """Returns the tiles that are tried for a kernel."""
    rows = (64, 128) if name == "forward" else (32, 64, 128)
    return [
        Tiles(block_m, block_n, warps, stages, tma, ahead)
        for block_m, block_n, warps, stages in itertools.product(rows, (32, 64, 128), (4, 8), (2, 3))
        for ahead in ((False, True) if name == "forward" else (False,))
    ]


def attention_kinds(target: int) -> list[Kind]:
    """Returns the kernels, where the target has them."""
    if dispatch.refused("mla_attention", target, torch.bfloat16, None):
        return []
    config = attention_config(target)
    return [
        Kind(
            "attention",
            name,
            getattr(config, name),
            candidates(name, config.forward.tma),
            functools.partial(fits, target=target, name=name),
            functools.partial(inputs, name, config),
        )
        for name in SHIPPED
    ]


def fits(cache: Path, tiles: Tiles, *, target: int, name: str) -> bool:
    """Whether tiles may ship: every kernel that is compiled with them."""
    attention_tuning.override = replace(attention_config(target), **{name: tiles})
    try:
        variants = [build.Variant(kernel, target, "bf16", None) for kernel in SHIPPED[name]]
        return not any(build.build_one(cache, variant).faults for variant in variants)
    except Exception:  # what the compiler cannot make is no candidate
        return False
    finally:
        attention_tuning.override = None


def inputs(name: str, config: AttentionConfig) -> Callable[[Tiles], float]:
    """Returns what measures tiles, of the forward or of both kernels of the gradient."""
    q, k, v, grad = (attention_bench.random(TOKENS, attention_bench.HEADS, width) for width in (192, 192, 128, 128))
    out = torch.empty_like(v)
    lse = torch.empty(attention_bench.HEADS, TOKENS, dtype=torch.float32, device="cuda")
    scale, parts = attention_bench.SCALE, (k[..., :128], k[..., 128:])
    attention.forward(q, parts, v, scale, None, config.forward, out, lse)

    def seconds(tiles: Tiles) -> float:
        tried = replace(config, **{name: tiles})
        if name == "forward":
            return attention_bench.median_time(
                lambda: attention.forward(q, parts, v, scale, None, tried.forward, out, lse)
            )
        return attention_bench.median_time(lambda: attention.gradients(grad, q, k, v, out, lse, scale, None, tried))

    return seconds
