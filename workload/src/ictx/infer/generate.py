"""Generation: chunked prefill into the latent cache, then token by token decoding."""

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
    """Statistics of a generation."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    new_tokens: int = 0
    """Tokens generated."""
    ready_seconds: float = 0.0
    """On a GPU, time to compile, load and capture kernels; not part of the other times."""
    prefill_seconds: float = 0.0
    """Time until the first new token."""
    decode_seconds: float = 0.0
    """Time for all further tokens."""
    cache_bytes: int = 0
    """Bytes of the tokens in the cache."""
    uncaptured: str | None = None
    """Why the decode step is not captured in a CUDA graph; None if it is."""
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
        prompt: token ids.
        chunk_size: prompt tokens per forward pass; bounds the memory of prefill.
        block_size: tokens per cache block; None: a contiguous cache.
        cache_dtype: dtype of the cache; default: the weights'. int8 and fp8 quantise the latents.
        report: updated during generation.

    On a GPU with kernels for all operations, a dense model's decode steps are replays of a CUDA graph (`DecodeStep`).

    Raises UserError if the prompt is empty or longer than the model's context, or the cache cannot be quantised.
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
            f"{len(prompt)} prompt tokens and {max_new_tokens} new tokens exceed the model's "
            f"max_position_embeddings, {config.max_position_embeddings}: shorten the prompt or lower --max-new-tokens"
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
    """Compiles and loads the kernels of prefill, and of decoding if `decode`; returns the seconds.

    Kernels are specialized for chunk lengths and some cache lengths, so this runs the first two and the last two chunks
    on a cache of zeros, and empties it afterwards.
    """
    began, length = time.perf_counter(), prompt_bs.shape[1]
    firsts = range(0, length, chunk_size)
    parts = [(first, prompt_bs[:, first : first + chunk_size]) for first in sorted({*firsts[:2], *firsts[-2:]})]
    for first, tokens in [*parts, (length, prompt_bs[:, :1])] if decode and length < cache.max_length else parts:
        cache.commit(cache.reserve(first))
        # Synchronizes with the device.
        model(tokens, cache=cache, last_only=True)[0, 0, 0].item()
        cache.release(0)
    return time.perf_counter() - began


def _following(
    model: Transformer, cache: LatentCache, newest: Tensor, sampler: Sampler, count: int, report: Report
) -> Iterator[int]:
    """Returns an iterator of `count` tokens after the newest, which is not in the cache yet; captures the step."""
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
    """Yields `count` tokens after the newest, with one forward pass each."""
    for _ in range(count):
        newest = sampler(model(newest[:, None], cache=cache, last_only=True)[:, -1])
        yield int(newest.item())


def refuse_quantised(stored: str, weight: Tensor, block_size: int | None) -> None:
    """Raises UserError if an int8 or fp8 cache is not supported with these weights and device."""
    if stored not in layout.QUANTISED:
        raise UserError(f"cache-dtype is {stored}: expected a dtype or one of {', '.join(layout.QUANTISED)}")
    if weight.dtype.itemsize != 2:
        raise UserError(
            f"cache-dtype {stored} keeps keys in the dtype of the weights, {str(weight.dtype).removeprefix('torch.')}, "
            "which must have 16 bits: set --dtype bfloat16 or float16"
        )
    if block_size is None:
        raise UserError(f"cache-dtype {stored} needs a cache in blocks: set a block size")
    if weight.device.type == "cuda":
        reason = dispatch.refused("mla_decode", dispatch.capability(weight.device), weight.dtype, stored)
        if reason and stored == "fp8":
            raise UserError(
                f"cache-dtype fp8 is not supported on this GPU: {reason}; use int8, which needs the same memory"
            )
