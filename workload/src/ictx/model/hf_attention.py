"""Our attention in transformers' models: `attn_implementation="ictx"`, for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ictx.kernels.attention.op import mla_attention
from ictx.kernels.attention.packing import Packing

NAME = "ictx"


def register() -> str:
    """Registers the attention with transformers and returns its name for `attn_implementation`; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, packing)
    return NAME


def packing(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool,
    use_vmap: bool,
    device: torch.device,
    **_: Any,
) -> Packing:
    """Returns the document boundaries of a batch, which replace a mask; called once per forward pass.

    transformers calls it with these argument names (`create_causal_mask`).

    Args:
        mask_function: whether a query attends to a key, given indices (batch, head, query, key); it includes documents
            detected from restarts in position_ids.
        attention_mask: True for tokens and False for padding, bool (batch, sequence).
        allow_is_causal_skip: whether `mask_function` is only causal.
        use_vmap: whether `mask_function` is a custom one, which document boundaries cannot represent.

    Raises:
        ValueError: there is a cache, or an unsupported mask.
    """
    if kv_length != q_length or use_vmap:
        raise ValueError(f"attention {NAME!r} is for training: no cache, and no masks but documents and padding")
    starts = torch.zeros(batch_size, q_length, dtype=torch.bool, device=device)
    if not allow_is_causal_skip:
        rows, tokens = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)
        starts[:, 1:] = ~mask_function(rows, 0, tokens[None], tokens[None] - 1)
    elif attention_mask is None or _only_behind(attention_mask):
        # No token attends to padding after it, so rows can count as documents of equal length, which is faster.
        return Packing.of_rows(batch_size, q_length, device)
    if attention_mask is not None:
        starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    starts[:, 0] = True
    return Packing.of_starts(starts.flatten())


def _only_behind(mask_bs: Tensor) -> bool:
    """Whether all padding is after the tokens; waits for the device."""
    return bool((mask_bs[:, 1:] <= mask_bs[:, :-1]).all())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Packing,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns attended values (batch, sequence, heads, value width), and no weights.

    Args:
        query, key, value: (batch, heads, sequence, width), with equal numbers of heads.
        attention_mask: the result of `packing`.

    Raises:
        ValueError: dropout is not 0, or keys have fewer heads than queries.
    """
    if dropout or key.shape[1] != query.shape[1]:
        raise ValueError(f"attention {NAME!r} supports neither dropout nor grouped queries")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = mla_attention(q, k, v, scaling, attention_mask)
    return out.view(*query.transpose(1, 2).shape[:3], -1), None
