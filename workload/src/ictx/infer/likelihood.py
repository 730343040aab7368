"""Log-likelihood of a given text: chunked prefill into the latent cache, which bounds the memory of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.errors import UserError
from ictx.infer.cache import LatentCache
from ictx.infer.generate import BLOCK_SIZE, refuse_quantised
from ictx.model import Transformer
from ictx.model.head import LOGITS


@dataclass(frozen=True)
class Prefill:
    """Settings for the prefill of a text."""

    chunk_size: int = 2048
    """Tokens of each sequence per forward pass; bounds the workspace."""
    cache_dtype: torch.dtype | str | None = None
    """Dtype of the cache; default: that of the weights. int8 and fp8 quantise the latents."""
    beyond: bool = False
    """Whether to allow more tokens than `max_position_embeddings`, to measure extrapolation."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise UserError(f"chunk-size is {self.chunk_size}: expected 1 or more")

    def require_fit(self, model: Transformer, tokens: int) -> None:
        """Raises UserError if a text of `tokens` tokens exceeds the model's context, unless `beyond` is set."""
        most = model.config.max_position_embeddings
        if tokens > most and not self.beyond:
            raise UserError(f"length is {tokens:,}: the model's max_position_embeddings is {most:,}")

    def cache(self, model: Transformer, batch: int, tokens: int) -> LatentCache:
        """Returns an empty cache for a batch of texts. Raises UserError if it cannot be quantised."""
        weight = model.lm_head.weight
        stored = self.cache_dtype if isinstance(self.cache_dtype, str) else None
        block_size = BLOCK_SIZE if stored else None
        if stored:
            refuse_quantised(stored, weight, block_size)
        dtype = self.cache_dtype if isinstance(self.cache_dtype, torch.dtype) else weight.dtype
        return LatentCache(
            model.config, batch, tokens, block_size=block_size, dtype=dtype, stored=stored, device=weight.device
        )


@torch.inference_mode()
def token_losses(model: Transformer, tokens_bs: Tensor, prefill: Prefill, last: int | None = None) -> Tensor:
    """Returns −ln p of each token given those before it, in nats, float32 on the CPU, of shape (batch, tokens - 1).

    Args:
        tokens_bs: integers of shape (batch, tokens), at least two tokens each.
        last: number of tokens to score, from the end; default: all. Logits of the others are not computed.

    Raises UserError if the tokens exceed the model's context.
    """
    losses, _ = _score(model, tokens_bs, prefill, last)
    return losses


@torch.inference_mode()
def continuation(model: Transformer, prompt: list[int], wanted: list[int], prefill: Prefill) -> tuple[Tensor, bool]:
    """Returns −ln p of each `wanted` token after the prompt, float32 (wanted,), and whether greedy decoding yields it.

    The tokens are scored, not generated: greedy decoding yields them if each is the likeliest given those before it.
    """
    losses, likeliest = _score(model, torch.tensor([prompt + wanted]), prefill, len(wanted))
    return losses[0], bool(likeliest.all())


def _score(model: Transformer, tokens_bs: Tensor, prefill: Prefill, last: int | None) -> tuple[Tensor, Tensor]:
    """Returns the losses of the last tokens, and whether each was the likeliest."""
    batch, count = tokens_bs.shape
    prefill.require_fit(model, count - 1)
    tokens_bs = tokens_bs.to(model.lm_head.weight.device)
    first_wanted = count - 1 - (last or count - 1)
    cache = prefill.cache(model, batch, count - 1)
    most = max(LOGITS // (batch * model.config.vocab_size), 1)
    losses, likeliest = [], []
    first = 0
    while first < count - 1:
        # Compute no logits before the wanted tokens, and then at most `LOGITS` per pass.
        wanted = first >= first_wanted
        size = min(prefill.chunk_size, most) if wanted else min(prefill.chunk_size, first_wanted - first)
        chunk = tokens_bs[:, first : min(first + size, count - 1)]
        logits = model(chunk, cache=cache, last_only=not wanted)
        if wanted:
            targets = tokens_bs[:, first + 1 : first + 1 + chunk.shape[1]]
            flat = logits.flatten(0, 1).float()
            losses.append(F.cross_entropy(flat, targets.flatten(), reduction="none").view(batch, -1).cpu())
            likeliest.append((logits.argmax(-1) == targets).cpu())
        first += chunk.shape[1]
    return torch.cat(losses, 1), torch.cat(likeliest, 1)
