"""Generation: chunked prefill into the latent cache, then a token at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.infer.cache import LatentCache
from ictx.infer.decode_step import DecodeStep, uncaptured
from ictx.infer.sampling import GREEDY, Sampler, Sampling
from ictx.kernels import dispatch, layout
from ictx.model import Transformer

BLOCK_SIZE = 64
"""Default tokens per cache block: kernels are shipped for it."""


@dataclass
class Report:
    """What a generation took."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    new_tokens: int = 0
    """Tokens generated."""
    ready_seconds: float = 0.0
    """On a GPU, time until kernels are compiled, loaded and captured: no part of the others."""
    prefill_seconds: float = 0.0
    """Time until the first new token."""
    decode_seconds: float = 0.0
    """Time for the others."""
    cache_bytes: int = 0
    """What the cache's tokens take."""
    uncaptured: str | None = None
    """Why no CUDA graph holds the decode step; None where one does."""
    tokens: list[int] = field(default_factory=list)
    """The new tokens."""

    def __str__(self) -> str:
        decoded = max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0
        line = (
            f"{self.prompt_tokens:,} prompt tokens at {self.prompt_tokens / self.prefill_seconds:,.0f} tokens/s, "
            f"{self.new_tokens:,} new tokens at {decoded:,.1f} tokens/s, cache {self.cache_bytes / 2**20:,.2f} MiB"
        )
        if not self.ready_seconds:
            return line
        step = f"not captured ({self.uncaptured})" if self.uncaptured else "captured"
        return f"{line}; before that {self.ready_seconds:,.1f} s to compile and load kernels, decode step {step}"


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: frozenset[int] = frozenset(),
    chunk_size: int = 512,
    block_size: int | None = BLOCK_SIZE,
    cache_dtype: torch.dtype | str | None = None,
    report: Report | None = None,
) -> Iterator[int]:
    """Yields new tokens until one of `stop` (which is not yielded) or `max_new_tokens`.

    Args:
        chunk_size: tokens of the prompt that go through the model at a time: what bounds the workspace of prefill.
        block_size: tokens of a block of the cache; None makes it contiguous.
        cache_dtype: what the cache holds; that of the weights unless given. int8 and fp8 quantise the latents.
        report: is filled in as generation goes on.

    On a GPU that all its kernels are built for, a dense model's tokens are replays of a CUDA graph (`DecodeStep`).

    Raises UserError when the prompt is empty or does not fit the model's context, or the cache cannot be quantised.
    """
    config, weight = model.config, model.lm_head.weight
    longest = len(prompt) + max_new_tokens
    if not prompt:
        raise UserError("the prompt is empty: expected at least one token")
    for name, value in (("max-new-tokens", max_new_tokens), ("chunk-size", chunk_size)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected 1 or more")
    if longest > config.max_position_embeddings:
        raise UserError(
            f"{len(prompt)} tokens of the prompt and {max_new_tokens} new ones are more than the model's "
            f"max_position_embeddings, {config.max_position_embeddings}"
        )
    dtype, stored = weight.dtype, None
    if isinstance(cache_dtype, str):
        stored = cache_dtype
        refuse_quantised(stored, weight, block_size)
    elif cache_dtype is not None:
        dtype = cache_dtype
    if block_size is not None:
        block_size = min(block_size, max(BLOCK_SIZE, 1 << (longest - 1).bit_length()))
    cache = LatentCache(config, 1, longest, block_size=block_size, dtype=dtype, stored=stored, device=weight.device)
    sampler, report = Sampler(sampling, weight.device), report or Report()
    report.prompt_tokens = len(prompt)
    report.uncaptured = uncaptured(model, cache)
    prompt_bs = torch.tensor([prompt], device=weight.device)
    chunk_size = min(chunk_size, len(prompt))
    if weight.device.type == "cuda":
        report.ready_seconds = _make_ready(model, cache, prompt_bs, chunk_size, report.uncaptured is not None)
    began = time.perf_counter()
    for first in range(0, len(prompt), chunk_size):
        logits = model(prompt_bs[:, first : first + chunk_size], cache=cache, last_only=True)
    newest = sampler(logits[:, -1])
    token = int(newest.item())
    report.prefill_seconds = time.perf_counter() - began
    following: Iterator[int] = iter(())
    for number in range(max_new_tokens):
        if number == 1:
            following = _following(model, cache, newest, sampler, max_new_tokens - 1, report)
            began = time.perf_counter()
        if number:
            token = next(following)
            report.decode_seconds = time.perf_counter() - began
        report.cache_bytes = (len(prompt) + number) * cache.bytes_per_token
        report.new_tokens += 1
        report.tokens.append(token)
        if token in stop:
            return
        yield token


def _make_ready(model: Transformer, cache: LatentCache, prompt_bs: Tensor, chunk_size: int, decode: bool) -> float:
    """Compiles and loads what the prompt's chunks launch, and a further token if `decode`; returns the seconds.

    Kernels are compiled for a chunk's length, and for some lengths of the cache: the first two chunks and the last two
    run, on a cache of zeros, which is empty again afterwards.
    """
    began, length = time.perf_counter(), prompt_bs.shape[1]
    firsts = range(0, length, chunk_size)
    parts = [(first, prompt_bs[:, first : first + chunk_size]) for first in sorted({*firsts[:2], *firsts[-2:]})]
    for first, tokens in [*parts, (length, prompt_bs[:, :1])] if decode and length < cache.max_length else parts:
        cache.commit(cache.reserve(first))
        # Waits for the device.
        model(tokens, cache=cache, last_only=True)[0, 0, 0].item()
        cache.release(0)
    return time.perf_counter() - began


def _following(
    model: Transformer, cache: LatentCache, newest: Tensor, sampler: Sampler, count: int, report: Report
) -> Iterator[int]:
    """Returns what yields `count` tokens after the newest, which is not in the cache yet; captures the step."""
    if report.uncaptured is not None:
        return _forwards(model, cache, newest, sampler, count)
    began = time.perf_counter()
    step = DecodeStep(model, cache, newest, count)
    graph = step.capture()
    torch.cuda.synchronize(newest.device)
    report.ready_seconds += time.perf_counter() - began

    def run() -> None:
        graph.replay()
        if sampler.sampling.temperature:
            step.token_b.copy_(sampler(step.logits))

    return (token for (token,) in step.follow(run, count))


def _forwards(model: Transformer, cache: LatentCache, newest: Tensor, sampler: Sampler, count: int) -> Iterator[int]:
    """Yields `count` tokens after the newest, a forward each."""
    for _ in range(count):
        newest = sampler(model(newest[:, None], cache=cache, last_only=True)[:, -1])
        yield int(newest.item())


def refuse_quantised(stored: str, weight: Tensor, block_size: int | None) -> None:
    """Raises UserError where a cache whose latents are int8 or fp8 cannot be had beside weights like this one."""
    if stored not in layout.QUANTISED:
        raise UserError(f"cache-dtype is {stored}: expected a dtype or one of {', '.join(layout.QUANTISED)}")
    if weight.dtype.itemsize != 2:
        raise UserError(
            f"cache-dtype {stored} keeps keys in the dtype of the weights, {str(weight.dtype).removeprefix('torch.')}, "
            "which must have 16 bits: give --dtype bfloat16 or float16"
        )
    if block_size is None:
        raise UserError(f"cache-dtype {stored} needs a cache in blocks: give a block size")
    if weight.device.type == "cuda":
        reason = dispatch.refused("mla_decode", dispatch.capability(weight.device), weight.dtype, stored)
        if reason and stored == "fp8":
            raise UserError(f"cache-dtype fp8 cannot be decoded on this GPU: {reason}; int8 takes as many bytes")
