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
    """Makes `attn_implementation=NAME` known to transformers, and returns the name; idempotent."""
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
    """Returns what stands for a mask: where the documents of the batch's tokens lie. It is made once a forward.

    transformers calls it with these names (`create_causal_mask`).

    Args:
        mask_function: whether a query sees a key, of indices (batch, head, query, key): it has the documents that
            position_ids show where they begin again.
        attention_mask: True for tokens and False for padding, bool (batch, sequence).
        allow_is_causal_skip: whether `mask_function` is nothing but causal.
        use_vmap: whether it is of a kind that documents cannot stand for.

    Raises:
        ValueError: for a cache, or a mask of other kinds.
    """
    if kv_length != q_length or use_vmap:
        raise ValueError(f"attention {NAME!r} is for training: no cache, and no mask but documents and padding")
    starts = torch.zeros(batch_size, q_length, dtype=torch.bool, device=device)
    if not allow_is_causal_skip:
        rows, tokens = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)
        starts[:, 1:] = ~mask_function(rows, 0, tokens[None], tokens[None] - 1)
    elif attention_mask is None or _only_behind(attention_mask):
        # Padding behind a row's tokens is seen by none of them: rows are as long as each other, which libraries like.
        return Packing.of_rows(batch_size, q_length, device)
    if attention_mask is not None:
        starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    starts[:, 0] = True
    return Packing.of_starts(starts.flatten())


def _only_behind(mask_bs: Tensor) -> bool:
    """Whether no padding stands before a token; waits for the device."""
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
        query, key, value: (batch, heads, sequence, width), as many heads of each.
        attention_mask: what `packing` made.
    """
    if dropout or key.shape[1] != query.shape[1]:
        raise ValueError(f"attention {NAME!r} has neither dropout nor shared heads")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = mla_attention(q, k, v, scaling, attention_mask)
    return out.view(*query.transpose(1, 2).shape[:3], -1), None
