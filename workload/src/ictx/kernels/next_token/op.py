"""The first and last operations of a decode step: a token's embedding, rotation and slot, and the largest logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels import dispatch
from ictx.kernels.products.op import OPERATION

PART = 1024
"""Logits per program in the search for the largest."""


@dataclass(frozen=True)
class Places:
    """Positions and cache slots of the next tokens of each sequence, computed before the first is decoded."""

    first_b: Tensor
    """Position of the first of them, int32 [batch]."""
    cos: Tensor
    """Cosines of their positions' angles, float32 [batch, tokens, 32], YaRN's factor included."""
    sin: Tensor
    """Sines, likewise."""
    slots: Tensor
    """Their slots in the cache, int64 [batch, tokens], as `mla_rope_cache` takes them."""


def begin(
    token_b: Tensor, lengths_b: Tensor, embedding: Tensor, places: Places
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the layers' inputs for each sequence's newest token, and increments `lengths_b`.

    Args:
        token_b: int64 [batch].
        lengths_b: cached tokens, int32 [batch]; incremented. Call this at most once per token of `places`.
        embedding: [vocabulary, width], contiguous.

    Returns:
        The token's row of the embedding [batch, width], cosines and sines [batch, 32], and slot [batch].
    """
    batch, count, pairs = places.cos.shape
    if dispatch.choose(OPERATION, embedding.device, embedding.dtype).name == "torch":
        row = torch.arange(batch, device=token_b.device)
        at = (lengths_b - places.first_b).long()
        lengths_b += 1
        return F.embedding(token_b, embedding), places.cos[row, at], places.sin[row, at], places.slots[row, at]
    from ictx.kernels.next_token import triton as kernels

    width = embedding.shape[1]
    x = torch.empty(batch, width, dtype=embedding.dtype, device=embedding.device)
    cos, sin = (torch.empty(batch, pairs, dtype=torch.float32, device=x.device) for _ in range(2))
    slot_b = torch.empty_like(token_b)
    kernels.begin[(batch,)](
        token_b, lengths_b, places.first_b, embedding, places.cos, places.sin, places.slots, x, cos, sin, slot_b, count,
        WIDTH=width, PADDED=1 << (width - 1).bit_length(), PAIRS=pairs,
        # The next launch may begin early; this one has no predecessor, as the first of a graph.
        DEPENDENT=dispatch.launches_early(x.device),
    )  # fmt: skip
    return x, cos, sin, slot_b


def choose_likeliest(logits: Tensor, token_b: Tensor) -> None:
    """Writes the index of each row's largest logit, the first one if tied, to `token_b` (int64 [batch]).

    Args:
        logits: [batch, vocabulary], contiguous.
    """
    if dispatch.choose(OPERATION, logits.device, logits.dtype).name == "torch":
        token_b.copy_(logits.argmax(-1))
        return
    from ictx.kernels.next_token import triton as kernels

    batch, vocabulary = logits.shape
    parts = -(-vocabulary // PART)
    values = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    indices = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    options = dispatch.launch_options(dispatch.launches_early(logits.device))
    kernels.best_of_part[(parts, batch)](logits, values, indices, vocabulary, parts, PART=PART, **options)
    padded = 1 << (parts - 1).bit_length()
    kernels.best_of_all[(batch,)](values, indices, token_b, parts, PADDED=padded, **options)
