"""Launches all kernels of the shipped models: training, prefill and decode step, with every cache dtype.

Runs on the meta device for `ictx kernels build`: shapes, strides and dtypes are those of a real run, without memory.
All layers launch the same kernels, so one is enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from ictx.infer.cache import LatentCache
from ictx.infer.decode_step import DecodeStep, unfit
from ictx.kernels import dispatch
from ictx.kernels.decode.op import SHORTEST
from ictx.model.config import ModelConfig
from ictx.model.transformer import Transformer
from ictx.settings import shipped

CONFIGS = "model/ictx-*.yaml"
CHUNKS = (8, 1, 512, 65536)
"""Numbers of tokens in successive forward passes: few, a prefill in one part, and one in several."""
BATCHES = (1, 2)
"""Products of one sequence's token use our kernels, those of several use PyTorch."""
BLOCKS = {None: (None, 16, 64), "int8": (64,), "fp8": (64,)}
"""Block sizes, None for a contiguous cache, by quantised dtype: `ictx generate` uses 64, vLLM 16 and 64 for an
unquantised cache."""
META = torch.device("meta")


def drive(target: int) -> None:
    """Launches all kernels to compile for a compute capability, for both kinds of memory if it has two."""
    run(target)
    if target == dispatch.FAST_TARGET:
        dispatch.standing_fast = True
        run(target)


def run(target: int) -> None:
    """Launches all kernels for one kind of memory."""
    for config in models():
        for dtype in (torch.float16, torch.bfloat16):
            if dispatch.refused("mla_rope_cache", target, dtype, None):
                continue
            with META:
                model = Transformer(config).to(dtype)
            if dispatch.refused("mla_attention", target, dtype, None) is None:
                train(model)
            model.eval()
            for stored, blocks in BLOCKS.items():
                if dispatch.refused("mla_decode", target, dtype, stored) is None:
                    for batch, block_size in itertools.product(BATCHES, blocks):
                        generate(model, batch, block_size, stored)


def models() -> Iterator[ModelConfig]:
    """Yields the shipped configurations with one layer, except models that do not support the captured decode step."""
    for config in map(ModelConfig.from_yaml, shipped(CONFIGS)):
        if unfit(config) is None:
            yield replace(config, num_hidden_layers=1)


def train(model: Transformer) -> None:
    """Runs the forward and backward pass of a training step."""
    tokens = torch.zeros(2, 1024, dtype=torch.int64, device=META)
    model.train()(tokens).float().sum().backward()


@torch.no_grad()
def generate(model: Transformer, batch: int, block_size: int | None, stored: str | None) -> None:
    """Runs a prefill, expanded and absorbed, and a decode step, on a long and a short cache."""
    dtype, length = model.lm_head.weight.dtype, 2 * sum(CHUNKS) + 1
    cache = LatentCache(model.config, batch, length, block_size=block_size, dtype=dtype, stored=stored, device=META)
    for tokens in CHUNKS:
        chunk = torch.zeros(batch, tokens, dtype=torch.int64, device=META)
        model(chunk, cache=cache, last_only=True, mode="expanded")
        model(chunk, cache=cache, last_only=True, mode="absorbed")
    for room in (length, SHORTEST // batch):
        cache = LatentCache(model.config, batch, room, block_size=block_size, dtype=dtype, stored=stored, device=META)
        DecodeStep(model, cache, torch.zeros(batch, dtype=torch.int64, device=META), 1)()
