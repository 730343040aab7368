"""The part of `ictx kernels tune` for `mla_attention` and `mla_prefill`: the tiles of their three kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ictx.kernels import dispatch, layout
from ictx.kernels.attention import launches, tuning
from ictx.kernels.attention.op import mla_attention
from ictx.kernels.attention.tuning import AttentionConfig, Tiles, attention_config
from ictx.kernels.bench import attention as attention_bench
from ictx.kernels.build import build
from ictx.kernels.prefill.op import WORKSPACE, mla_prefill
from ictx.kernels.tune.kind import Kind

TOKENS = 16384
KERNELS = {
    "forward": ("attention.forward",),
    "keys_values": ("attention_backward.keys_values",),
    "queries": ("attention_backward.queries",),
}
"""Kernels that are compiled with the tiles of each kind."""


def candidates(name: str, tma: bool) -> list[Tiles]:
    """Returns the candidate tiles of a kernel."""
    rows = (64, 128) if name == "forward" else (32, 64, 128)
    return [
        Tiles(block_m, block_n, warps, stages, tma, ahead)
        for block_m, block_n, warps, stages in itertools.product(rows, (16, 32, 64, 128), (4, 8), (1, 2, 3))
        for ahead in ((False, True) if name == "forward" else (False,))
    ]


def attention_kinds(target: int) -> list[Kind]:
    """Returns the kernels to tune; none if the target does not support them."""
    if dispatch.refused("mla_attention", target, dispatch.half(target), None):
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
        for name in KERNELS
    ]


def fits(cache: Path, tiles: Tiles, *, target: int, name: str) -> bool:
    """Whether every kernel compiled with these tiles passes the release checks."""
    tuning.override = replace(attention_config(target), **{name: tiles})
    try:
        return build.fit(cache, target, functools.partial(launch, dispatch.half(target)), KERNELS[name])
    except Exception:  # a candidate that does not compile does not fit
        return False
    finally:
        tuning.override = None


def launch(dtype: torch.dtype) -> None:
    """Runs, on the meta device, a training step on packed documents, and a prefill in one part and in several."""

    def given(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    heads, nope, value = attention_bench.HEADS, 128, 128
    q, k, v = (given(TOKENS, heads, width) for width in (nope + layout.ROPE, nope + layout.ROPE, value))
    packing = torch.empty(3, dtype=torch.int32, device="meta")
    torch.autograd.grad(mla_attention(q, k, v, attention_bench.SCALE, packing).sum(), (q, k, v))
    with torch.no_grad():
        cache, weight = given(1, TOKENS, layout.ROW), given(heads * (nope + value), layout.LATENT)
        for workspace in (1, WORKSPACE):
            mla_prefill(q, cache, TOKENS, weight, attention_bench.SCALE, workspace=workspace, mode="expanded")


def inputs(name: str, config: AttentionConfig) -> Callable[[Tiles], float]:
    """Returns a function that measures tiles in seconds: of the forward pass, or of both gradient kernels."""
    random = functools.partial(attention_bench.random, dtype=dispatch.half(dispatch.capability(torch.device("cuda"))))
    q, k, v, grad = (random(TOKENS, attention_bench.HEADS, width) for width in (192, 192, 128, 128))
    out = torch.empty_like(v)
    lse = torch.empty(attention_bench.HEADS, TOKENS, dtype=torch.float32, device="cuda")
    scale, parts = attention_bench.SCALE, (k[..., :128], k[..., 128:])
    launches.forward(q, parts, v, scale, None, config.forward, out, lse)

    def seconds(tiles: Tiles) -> float:
        tried = replace(config, **{name: tiles})
        if name == "forward":
            return attention_bench.median_time(
                lambda: launches.forward(q, parts, v, scale, None, tried.forward, out, lse)
            )
        return attention_bench.median_time(
            lambda: launches.gradients(grad, q, k, v, out, lse, scale, None, None, tried)
        )

    return seconds
