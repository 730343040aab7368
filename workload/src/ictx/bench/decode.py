"""`ictx bench decode`: prefill and decoding of a whole model; compares the time per token with its lower bound (floor).

Weights and prompt are random. A decoded token is one replay of a CUDA graph; its time is the median over the tokens.
The floor's bandwidth is that of a copy, measured in the same run. A memory cap emulates a smaller card: PyTorch's
allocator gets the cap minus the memory that the process uses outside of it (CUDA's context).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch

from ictx.bench.floor import Floor, floor_of
from ictx.bench.trace import Trace, trace
from ictx.errors import UserError
from ictx.infer.cache import LatentCache
from ictx.infer.decode_step import DecodeStep, unfit
from ictx.kernels import layout
from ictx.kernels.bench.timing import copy_bandwidth
from ictx.model import ModelConfig, Transformer

BLOCK = 64
PROFILED = 4
"""Replays under the profiler."""
LATER = 256e6
"""Bytes of a cap reserved for kernels and graphs, which CUDA allocates after the cap is set."""


@dataclass(frozen=True)
class Case:
    """A case to measure."""

    config: ModelConfig
    context: int
    """Cached tokens at the end."""
    new_tokens: int
    """Number of these that are decoded and timed."""
    stored: str | None
    """Format to which latents are quantised; None: 16 bits."""
    memory: float | None
    """Cap of the GPU's memory in bytes; None: no cap."""
    chunk: int
    """Tokens per prefill step."""
    prefill: bool
    """Whether the context is prefilled; otherwise the cache is filled with random rows."""
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("context", "new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}: expected 1 or more")
        if self.context > self.config.max_position_embeddings:
            raise UserError(
                f"context is {self.context}: the model's max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        if self.prompt < 1:
            raise UserError(
                f"context is {self.context}: expected more than the {self.new_tokens} new tokens and the {PROFILED} "
                "that are profiled"
            )
        if reason := unfit(self.config):
            raise UserError(f"this model has no captured decode step: {reason}")

    @property
    def prompt(self) -> int:
        """Tokens that are cached before the first is decoded."""
        return self.context - self.new_tokens - PROFILED

    @property
    def floor(self) -> Floor:
        """Floor of the token in the middle of the timed ones."""
        return floor_of(self.config, self.prompt + self.new_tokens // 2, self.dtype, self.stored)


@dataclass(frozen=True)
class Measured:
    """Results; times in seconds, memory in bytes."""

    bandwidth: float
    """Bytes per second that a copy reads and writes."""
    prefill: float | None
    """Time of the prefill."""
    step: float
    """Median time of a graph's replay between two events on the GPU."""
    wall: float
    """Mean time per token on the host's clock; the host reads each token while the next one is decoded."""
    trace: Trace | None
    allocated: int
    """Peak memory of PyTorch's tensors."""
    taken: int
    """Peak memory of the process: the allocator's, and memory outside of it."""

    @property
    def overhead(self) -> float | None:
        """Share of a token's wall time in which no kernel runs: gaps between launches, and host time."""
        return None if self.trace is None else 1 - self.trace.busy / self.wall


def outside() -> int:
    """Returns the bytes that this GPU's processes use outside of PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def cap(memory: float | None) -> None:
    """Limits the allocator so that the process uses at most `memory` bytes; None removes the limit.

    Raises UserError if nothing remains for tensors, or if the GPU has less memory.
    """
    if memory is None:
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    total = torch.cuda.mem_get_info()[1]
    left = memory - outside() - LATER
    if not 0 < left <= total:
        raise UserError(
            f"a cap of {memory / 1e9:.1f} GB leaves {left / 1e9:.1f} GB to tensors; the GPU has {total / 1e9:.1f} GB"
        )
    torch.cuda.set_per_process_memory_fraction(left / total)


def random_model(config: ModelConfig, dtype: torch.dtype, device: str = "cuda") -> Transformer:
    """Returns a model with random weights, without modules that only training uses."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, num_nextn_predict_layers=0)).to(dtype)
    model.to_empty(device=device)
    model.init_weights(seed=0)
    return model.eval().requires_grad_(False)


def fill(cache: LatentCache, tokens: int) -> None:
    """Fills a cache with random rows and adds `tokens` tokens to every sequence."""
    for layer in cache.layers:
        for blocks in torch.split(layer, 1024):
            if cache.stored:
                rows = torch.randn(*blocks.shape[:2], layout.ROW, dtype=cache.dtype, device=layer.device)
                blocks.copy_(layout.quantise(rows, cache.stored))
            else:
                blocks.normal_()
    cache.commit(cache.reserve(tokens))


def measure(case: Case) -> Measured:
    """Runs a case on the GPU, under its cap. Raises UserError without a GPU."""
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU: nothing can be measured here")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    cap(case.memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        return _measure(case, bandwidth)
    finally:
        cap(None)


@torch.inference_mode()
def _measure(case: Case, bandwidth: float) -> Measured:
    """Runs a case; a cap is set."""
    model = random_model(case.config, case.dtype)
    cache = LatentCache(
        case.config, 1, case.context, block_size=BLOCK, dtype=case.dtype, stored=case.stored, device="cuda"
    )
    seconds = None
    generator = torch.Generator("cuda").manual_seed(1)
    tokens = torch.randint(case.config.vocab_size, (1, case.prompt), device="cuda", generator=generator)
    newest = tokens[:, -1]
    if case.prefill:
        # The first chunk compiles kernels: run it before on a separate cache, to exclude it from the time.
        warm = LatentCache(
            case.config, 1, case.chunk, block_size=BLOCK, dtype=case.dtype, stored=case.stored, device="cuda"
        )
        model(tokens[:, : case.chunk], cache=warm, last_only=True)
        del warm
        torch.cuda.synchronize()
        began = time.perf_counter()
        for part in torch.split(tokens, case.chunk, 1):
            newest = model(part, cache=cache, last_only=True)[:, -1].argmax(-1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    else:
        fill(cache, case.prompt)
    step = DecodeStep(model, cache, newest, case.new_tokens + PROFILED)
    graph = step.capture()
    spans = []

    def timed() -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        spans.append((begin, end))

    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in step.follow(timed, case.new_tokens):
        pass
    wall = (time.perf_counter() - began) / case.new_tokens
    times = [begin.elapsed_time(end) * 1e-3 for begin, end in spans]
    seen = trace(graph.replay, PROFILED)
    step.finish()
    reserved = torch.cuda.max_memory_reserved()
    return Measured(
        bandwidth,
        seconds,
        statistics.median(times),
        wall,
        seen,
        torch.cuda.max_memory_allocated(),
        reserved + outside(),
    )
