"""Multi-head Latent Attention in two equivalent modes (arXiv:2405.04434, section 2.1).

Expanded computes keys and values from the latents and attends per head: cheaper if many queries share the keys, as in
training and prefill. Absorbed multiplies the queries and the result by the two halves of `kv_b_proj` instead, and
attends to the latents: cheaper for few queries and many keys, as in decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ictx.kernels.attention.op import choice, mla_attention
from ictx.kernels.attention.packing import Packing
from ictx.model.cache import Slots
from ictx.model.config import LATENT_NORM_EPS, ModelConfig
from ictx.model.context import Context
from ictx.model.rope import Rotations, rotate

LONGEST_DENSE_MASK = 2048
"""Maximum length of sequences with several documents that use a dense mask; longer ones attend per document."""

Mode = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True)
class Documents:
    """Documents of a batch: runs of equal document ids, without padding. Tokens attend within their document only."""

    packing: Packing
    """The documents for the kernels, which treat all rows as one sequence."""
    starts_bs: Tensor | None = None
    """True where a document starts, bool (batch, sequence); the first column is unused. None if every row is one
    document."""

    @classmethod
    def of(cls, tokens_bs: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None) -> Documents:
        """Returns the documents of a batch.

        Args:
            tokens_bs: any tensor of shape (batch, sequence, …).
            document_ids: integers of shape (batch, sequence); a document ends where the id changes.
            attention_mask: 1 for tokens and 0 for padding, of the same shape. Padding attends only to padding, so that
                its attention is finite.
        """
        given = [ids for ids in (document_ids, attention_mask) if ids is not None]
        if not given:
            return cls(Packing.of_rows(*tokens_bs.shape[:2], tokens_bs.device))
        starts = torch.zeros_like(given[0], dtype=torch.bool)
        for ids in given:
            starts[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        edges = starts.clone()
        edges[:, :1] = True
        return cls(Packing.of_starts(edges.flatten()), starts)

    @cached_property
    def mask_bqk(self) -> Tensor | None:
        """True where a query attends to a key, bool (batch, 1, sequence, sequence); None for long sequences."""
        if self.starts_bs is None or self.starts_bs.shape[1] > LONGEST_DENSE_MASK:
            return None
        runs = self.starts_bs.cumsum(1)
        return (runs[:, None, :, None] == runs[:, None, None, :]).tril()

    @cached_property
    def bounds(self) -> list[list[int]]:
        """First token of each document and the end of the last, per row."""
        assert self.starts_bs is not None
        return [[0, *row.nonzero().flatten().tolist(), len(row)] for row in self.starts_bs]


class Cache(Protocol):
    """Earlier tokens of a batch's sequences, and attention to them (see `infer.cache`)."""

    def reserve(self, tokens: int, mask_bs: Tensor | None = None) -> Slots:
        """Returns the slots of `tokens` more tokens per sequence, without those that are padding (0) in `mask_bs`."""

    def attend(
        self,
        attention: LatentAttention,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        new_bse: Tensor,
        rope: Rotations,
        slots: Slots,
        mode: Mode,
    ) -> Tensor:
        """Adds new tokens to a layer and attends to it; returns (batch, sequence, heads, v_head_dim).

        Args:
            q_nope: queries' parts without position, (batch, sequence, heads, width).
            q_rope: queries' rotated parts, likewise.
            new_bse: latents before the norm and keys before the rotation, (batch, sequence, cache_width).
        """

    def commit(self, slots: Slots) -> None:
        """Updates the lengths, once every layer has stored the slots' tokens."""


class LatentAttention(nn.Module):
    """Multi-head Latent Attention with low-rank projections and a decoupled rotary key."""

    context: Context | None = None
    """Context-parallel ranks, in forward passes without a cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, self.config = config.num_attention_heads, config
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.cache_width, bias=False)
        self.rotary_key = nn.Identity()  # a module, so that hooks can record its magnitude
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=LATENT_NORM_EPS)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x_bsd: Tensor,
        rope: Rotations,
        documents: Documents | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        slots: Slots | None = None,
        mode: Mode = "auto",
    ) -> Tensor:
        """Returns the attended values, of the shape and dtype of `x_bsd`.

        Args:
            rope: rotations of the tokens' positions.
            documents: the batch's documents, without a cache; default: one per row.
            cache: earlier tokens; the new ones are added to `layer` at `slots`.
            mode: how to attend with a cache; auto selects the mode with fewer operations.
        """
        q_nope, q_rope = self._queries(x_bsd)
        q_rope = rotate(q_rope, rope)
        new_bse = self.kv_a_proj_with_mqa(x_bsd)
        if cache is not None:
            assert slots
            out_bshv = cache.attend(self, layer, q_nope, q_rope, new_bse, rope, slots, mode)
        elif self.context:
            assert documents is not None
            latent_bse, weight = torch.cat(self.normed(new_bse, rope), -1), self.kv_b_proj.weight
            q_bshd, scale = torch.cat([q_nope, q_rope], -1), self.config.softmax_scale
            out_bshv = self.context.attend(q_bshd, latent_bse, weight, scale, documents.packing)
        else:
            out_bshv = self._within(q_nope, q_rope, *self.normed(new_bse, rope), documents)
        return cast(Tensor, self.o_proj(out_bshv.flatten(-2)))

    def _queries(self, x_bsd: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the queries' parts without and with position, each (batch, sequence, heads, width)."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q_proj(x_bsd)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_bsd)))
        q_bshd = q.unflatten(-1, (config.num_attention_heads, -1))
        q_nope, q_rope = q_bshd.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        return q_nope, q_rope

    def normed(self, new_bse: Tensor, rope: Rotations) -> tuple[Tensor, Tensor]:
        """Returns the normed latents and the rotated keys of new tokens, each (batch, sequence, width)."""
        latent, k_rope = torch.split(new_bse, [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        # One rotary key for all heads.
        return self.kv_a_layernorm(latent), rotate(self.rotary_key(k_rope)[:, :, None, :], rope).squeeze(2)

    def keys_values(self, latent_btc: Tensor, k_rope_btr: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of cached tokens, each (batch, tokens, heads, width)."""
        config, heads = self.config, self.config.num_attention_heads
        kv = self.kv_b_proj(latent_btc).unflatten(-1, (heads, -1))
        k_nope, v_bthv = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        return torch.cat([k_nope, k_rope_btr[:, :, None].expand(-1, -1, heads, -1)], -1), v_bthv

    def _within(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, documents: Documents | None
    ) -> Tensor:
        """Expanded attention among the tokens of this pass; returns (batch, sequence, heads, v_head_dim)."""
        q = torch.cat([q_nope, q_rope], -1)
        k, v = self.keys_values(latent, k_rope)
        documents = documents or Documents.of(q, None, None)
        if choice("mla_attention", q, v.shape[-1], documents.packing.equal).name != "torch":
            batch, sequence = q.shape[:2]
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = mla_attention(q, k, v, self.config.softmax_scale, documents.packing)
            return out.view(batch, sequence, *v.shape[1:])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if documents.starts_bs is None else documents.mask_bqk
        if documents.starts_bs is None or mask is not None:
            return self._attend(q, k, v, mask).transpose(1, 2)
        rows = []
        for row, bounds in enumerate(documents.bounds):
            spans = [slice(first, end) for first, end in pairwise(bounds)]
            one = slice(row, row + 1)
            rows.append(torch.cat([self._attend(q[one, :, s], k[one, :, s], v[one, :, s], None) for s in spans], 2))
        return torch.cat(rows).transpose(1, 2)

    def _attend(self, q_bhsd: Tensor, k_bhsd: Tensor, v_bhsv: Tensor, mask: Tensor | None) -> Tensor:
        """Returns softmax(q·kᵀ·scale)·v, causal if there is no mask."""
        width, scale = v_bhsv.shape[-1], self.config.softmax_scale
        # PyTorch's fused attention on the CPU, unlike on GPUs, requires values with the width of the keys.
        if q_bhsd.device.type == "cpu" and width < q_bhsd.shape[-1]:
            v_bhsv = F.pad(v_bhsv, (0, q_bhsd.shape[-1] - width))
        out = F.scaled_dot_product_attention(q_bhsd, k_bhsd, v_bhsv, mask, is_causal=mask is None, scale=scale)
        return out[..., :width]
