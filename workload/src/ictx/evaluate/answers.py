"""Completion of prompts by a model on this machine, or by one behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ictx.evaluate.endpoint import Endpoint
from ictx.infer.generate import generate
from ictx.infer.likelihood import Prefill
from ictx.infer.sampling import GREEDY, Sampling
from ictx.infer.vocabulary import Vocabulary
from ictx.model import Transformer


class Answers(Protocol):
    """Completes prompts."""

    def __call__(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        """Returns the completion of each prompt (token ids) as text of at most `new_tokens` tokens."""


@dataclass(frozen=True)
class Local:
    """A model on this machine; computes one prompt at a time."""

    model: Transformer
    vocabulary: Vocabulary
    prefill: Prefill
    sampling: Sampling = GREEDY

    def __call__(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        """See `Answers`. Raises UserError if a prompt is longer than the model's context."""
        return [self._one(prompt, new_tokens) for prompt in prompts]

    def _one(self, prompt: list[int], new_tokens: int) -> str:
        tokens = generate(
            self.model,
            prompt,
            max_new_tokens=new_tokens,
            sampling=self.sampling,
            stop=self.vocabulary.stop,
            chunk_size=self.prefill.chunk_size,
            cache_dtype=self.prefill.cache_dtype,
        )
        return str(self.vocabulary.tokenizer.decode(list(tokens)))


@dataclass(frozen=True)
class Remote:
    """A model behind an endpoint; sends all prompts at once."""

    endpoint: Endpoint

    def __call__(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        """See `Answers`. Raises UserError if the endpoint does not respond."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.endpoint.complete(prompt, max_tokens=new_tokens), prompts))
