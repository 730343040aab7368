"""Generation: chunked prefill into the latent cache, then a token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ictx.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, read_tokenizer, special_text
from ictx.errors import UserError
from ictx.infer.cache import LatentCache
from ictx.infer.decode_step import DecodeStep, captures
from ictx.kernels import dispatch, layout
from ictx.model import Transformer
from ictx.model.hf_config import read_object
from ictx.model.hf_generation import Generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only this many likeliest tokens are in the draw; 0 leaves all in."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are in the draw."""
    seed: int | None = None
    """Makes the draws repeatable."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}: expected more than 0, and at most 1")


class Sampler:
    """Draws tokens."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits_bv: Tensor) -> Tensor:
        """Returns a token for each row, int64 of shape (batch,)."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return logits_bv.argmax(-1)
        logits_bv = logits_bv.float() / sampling.temperature
        if sampling.top_k:
            lowest = logits_bv.topk(min(sampling.top_k, logits_bv.shape[-1])).values[:, -1:]
            logits_bv = logits_bv.masked_fill(logits_bv < lowest, -torch.inf)
        ordered, tokens = logits_bv.softmax(-1).sort(-1, descending=True)
        # The token that reaches the limit is the last one in.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        return tokens.gather(1, torch.multinomial(ordered, 1, generator=self.generator)).squeeze(1)


@dataclass
class Report:
    """What a generation took."""

    prompt_tokens: int = 0
    """Tokens of the prompt."""
    new_tokens: int = 0
    """Tokens generated."""
    prefill_seconds: float = 0.0
    """Time until the first new token."""
    decode_seconds: float = 0.0
    """Time for the others."""
    cache_bytes: int = 0
    """What the cache's tokens take."""
    tokens: list[int] = field(default_factory=list)
    """The new tokens."""

    def __str__(self) -> str:
        decoded = max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0
        return (
            f"{self.prompt_tokens:,} prompt tokens at {self.prompt_tokens / self.prefill_seconds:,.0f} tokens/s, "
            f"{self.new_tokens:,} new tokens at {decoded:,.1f} tokens/s, cache {self.cache_bytes / 2**20:,.2f} MiB"
        )


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: frozenset[int] = frozenset(),
    chunk_size: int = 512,
    block_size: int | None = 64,
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
    cache = LatentCache(config, 1, longest, block_size=block_size, dtype=dtype, stored=stored, device=weight.device)
    sampler, report = Sampler(sampling, weight.device), report or Report()
    report.prompt_tokens = len(prompt)
    began = time.perf_counter()
    prompt_bs = torch.tensor([prompt], device=weight.device)
    for first in range(0, len(prompt), chunk_size):
        logits = model(prompt_bs[:, first : first + chunk_size], cache=cache, last_only=True)
    newest = sampler(logits[:, -1])
    following = _following(model, cache, newest, sampler, max_new_tokens - 1)
    for number in range(max_new_tokens):
        token = next(following) if number else int(newest.item())
        now = time.perf_counter()
        if number == 0:
            report.prefill_seconds = now - began
            began = now
        report.decode_seconds = now - began if number else 0.0
        report.cache_bytes = (len(prompt) + number) * cache.bytes_per_token
        report.new_tokens += 1
        report.tokens.append(token)
        if token in stop:
            return
        yield token


def _following(model: Transformer, cache: LatentCache, newest: Tensor, sampler: Sampler, count: int) -> Iterator[int]:
    """Yields `count` tokens after the newest, which is not in the cache yet."""
    if count and captures(model, cache):
        step = DecodeStep(model, cache, newest, count)
        graph = step.capture()

        def run() -> None:
            graph.replay()
            if sampler.sampling.temperature:
                step.token_b.copy_(sampler(step.logits))

        for (token,) in step.follow(run, count):
            yield token
        return
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


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's tokenizer, and the tokens that end generation."""

    tokenizer: Tokenizer
    stop: frozenset[int]
    chat_template: str | None
    special: Mapping[str, str]
    """Special tokens that a template may name, such as `bos_token`."""

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Reads them. Raises UserError when the folder has no tokenizer, or a file of it is damaged."""
        if directory.is_dir() and not (directory / TOKENIZER_FILE).exists():
            raise UserError(f"{directory} has no {TOKENIZER_FILE}: the checkpoint was exported without a tokenizer")
        tokenizer = read_tokenizer(directory)
        settings: dict[str, Any] = {}
        for file in (directory / "special_tokens_map.json", directory / TOKENIZER_CONFIG_FILE):
            settings |= read_object(file) if file.exists() else {}
        texts = {name: special_text(token) for name, token in settings.items() if name.endswith("_token")}
        special = {name: text for name, text in texts.items() if text is not None}
        template_file = directory / "chat_template.jinja"
        template = template_file.read_text() if template_file.exists() else settings.get("chat_template")
        return cls(tokenizer, Generation.read(directory).stop, template, special)

    def encode(self, text: str, chat: bool) -> list[int]:
        """Returns the tokens of a text, or of a chat in which a user has said it. Raises UserError.

        As in transformers, the tokenizer itself begins a text, and a template a chat.
        """
        if chat:
            text = self._turn(text)
        return list(self.tokenizer.encode(text, add_special_tokens=not chat).ids)

    def _turn(self, text: str) -> str:
        if self.chat_template is None:
            raise UserError("the checkpoint has no chat template: leave --chat out")
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Answer(Extension):
            """The block that marks what a model writes: it says nothing here."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Parser) -> list[Node]:
                """Returns what is in the block."""
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Answer])
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        return environment.from_string(self.chat_template).render(
            self.special, messages=messages, add_generation_prompt=True
        )

    def stream(self, tokens: Iterator[int], write: Callable[[str], object]) -> None:
        """Writes text as its tokens come: a character of several tokens when it is whole."""
        decoder = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            text = decoder.step(self.tokenizer, token)
            if text:
                write(text)
