"""DeepSeek-V3 (arXiv:2412.19437, section 2). Module names match its published weights."""

from __future__ import annotations

import zlib
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ictx.model.attention import Cache, Documents, LatentAttention, Mode
from ictx.model.cache import Slots
from ictx.model.config import ModelConfig
from ictx.model.context import Context
from ictx.model.head import Head
from ictx.model.moe import Experts, FeedForward, MoeFeedForward, Router, update_router_biases
from ictx.model.rope import Rotations, rotations


class Layer(nn.Module):
    """Attention and feed-forward layer, each applied after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, moe = index, config.layer_moe(index)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module = (
            MoeFeedForward(moe, config.hidden_size)
            if moe
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x_bsd: Tensor,
        rope: Rotations,
        documents: Documents | None = None,
        cache: Cache | None = None,
        slots: Slots | None = None,
        mode: Mode = "auto",
    ) -> Tensor:
        """Returns the residual stream after this layer."""
        # Without a cache the index is constant: torch.compile would recompile the layer for each index.
        index = 0 if cache is None else self.index
        attended = self.self_attn(self.input_layernorm(x_bsd), rope, documents, cache, index, slots, mode)
        x_bsd = x_bsd + attended
        return cast(Tensor, x_bsd + self.mlp(self.post_attention_layernorm(x_bsd)))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class NextTokenModule(nn.Module):
    """Multi-Token Prediction: a layer that predicts one more token, with the model's embedding and head (2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = Layer(config, config.num_hidden_layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, next_bsd: Tensor, hidden_bsd: Tensor, rope: Rotations, documents: Documents | None) -> Tensor:
        """Returns the head's input, of the shape of `hidden_bsd`.

        Args:
            next_bsd: embedding of each position's next token.
            hidden_bsd: the model's normed residual stream at each position.
        """
        x_bsd = self.eh_proj(torch.cat([self.enorm(next_bsd), self.hnorm(hidden_bsd)], -1))
        return cast(Tensor, self.norm(self.layer(x_bsd, rope, documents)))


class Transformer(nn.Module):
    """A causal language model."""

    mtp_loss: Tensor | None = None
    """MTP's mean cross-entropy over its labels, the tokens after the next, from the last forward pass in training."""
    z_loss_weight = 0.0
    """Weight of the z-loss (`Head.losses`) in training."""
    z_loss: Tensor | None = None
    """The z-loss in the last loss, detached."""
    context: Context | None = None
    """Context-parallel ranks: each calls `forward` with its own part of the windows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(NextTokenModule(config) for _ in range(config.num_nextn_predict_layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        each: bool = False,
        last_only: bool = False,
        mode: Mode = "auto",
    ) -> Tensor:
        """Returns the logits of each next token, of shape (batch, sequence, vocab_size), or the loss with `labels`.

        Args:
            input_ids: integers of shape (batch, sequence).
            position_ids: positions of the same shape, or one row for all; by default the tokens of each row are counted
                from 0, or from the cache's length, without padding.
            cache: earlier tokens of the batch's sequences; the new tokens are added to it.
            attention_mask: 1 for tokens and 0 for padding, on either side.
            document_ids: integers; a document ends where they change, and tokens attend only within their document.
            labels: the next token of each position; negative labels are ignored. The result is then their mean
                cross-entropy in nats, plus the z-loss if it is enabled and gradients are; logits are computed in
                chunks.
            each: with `labels`, return each label's log-probability instead, float32 (batch, sequence), 0 for ignored
                labels.
            last_only: return only the logits of the last position, of shape (batch, 1, vocab_size).
            mode: how to attend to a cache: "expanded", "absorbed", or "auto" for the cheaper one.

        With a `context`, all tensors are a rank's part of the windows, and the loss is the mean over its own labels.

        Raises:
            ValueError: a `context` with a cache or padding, or `document_ids` with a cache.
        """
        slots = None
        if self.context and (cache is not None or attention_mask is not None):
            raise ValueError("context parallelism supports neither a cache nor padding")
        if cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids cannot be used with a cache, which holds one document per row")
            slots = cache.reserve(input_ids.shape[1], attention_mask)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, slots)
        documents = None if slots else self._documents(input_ids, document_ids, attention_mask)
        rope = rotations(self.config, position_ids)
        x_bsd = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x_bsd = layer(x_bsd, rope, documents, cache, slots, mode)
        if cache is not None and slots is not None:
            cache.commit(slots)
        hidden_bsd = self.model.norm(x_bsd)
        if labels is None:
            return cast(Tensor, self.lm_head(hidden_bsd[:, -1:] if last_only else hidden_bsd))
        if each:
            return self.lm_head.log_probs(hidden_bsd, labels)
        if self.training and torch.is_grad_enabled() and len(self.mtp):
            self.mtp_loss = self._further_loss(input_ids, labels, hidden_bsd, rope, documents)
        loss, self.z_loss = self.lm_head.losses(hidden_bsd, labels, z_weight=self.z_loss_weight)
        return loss

    def _positions(self, input_ids: Tensor, attention_mask: Tensor | None, slots: Slots | None) -> Tensor:
        """Returns the position of each token."""
        if slots is not None:
            return slots.positions_bs
        if attention_mask is not None:
            return (attention_mask.cumsum(1) - 1).clamp(min=0)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return places + self.context.rank * input_ids.shape[1] if self.context else places

    def _documents(self, input_ids: Tensor, document_ids: Tensor | None, attention_mask: Tensor | None) -> Documents:
        """Returns the documents of the whole windows."""
        if self.context is None:
            return Documents.of(input_ids, document_ids, attention_mask)
        window = input_ids[:, :1].expand(-1, input_ids.shape[1] * self.context.count)
        return Documents.of(window, None if document_ids is None else self.context.gather(document_ids), None)

    def _further_loss(
        self, input_ids: Tensor, labels: Tensor, hidden_bsd: Tensor, rope: Rotations, documents: Documents | None
    ) -> Tensor:
        """Returns the mean cross-entropy of each token after the next."""
        context = self.context
        ids, wanted = (context.gather(x) if context else x for x in (input_ids, labels))
        next_ids = torch.cat([ids[:, 1:], wanted[:, -1:].clamp(min=0)], 1)
        if context:
            next_ids = context.own(next_ids)
        read_bsd = self.mtp[0](self.model.embed_tokens(next_ids), hidden_bsd, rope, documents)
        return self.lm_head.loss(read_bsd, self.further_labels(labels))

    def further_labels(self, labels: Tensor) -> Tensor:
        """Returns the token after the next of each position, of the shape of `labels`; negative if there is none."""
        whole = self.context.gather(labels) if self.context else labels
        further = F.pad(whole[:, 1:], (0, 1), value=-1)
        return self.context.own(further) if self.context else further

    @property
    def routers(self) -> list[Router]:
        """The routers of all layers."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Returns the losses that training adds to that of the last forward pass; none for a dense model without MTP.

        `balance_loss` is the sum over the layers with experts, averaged over sequences; `mtp_loss` is the weighted MTP
        loss, averaged over its labels.
        """
        layers = (layer.balance_loss for layer in self.modules() if isinstance(layer, MoeFeedForward))
        balance = [loss for loss in layers if loss is not None]
        found = {"balance_loss": torch.stack(balance).sum()} if balance else {}
        if self.mtp_loss is not None:
            found["mtp_loss"] = self.config.mtp_loss_weight * self.mtp_loss
        return found

    def after_step(self, updated: bool = True) -> Tensor | None:
        """Updates the router biases after an optimizer step, so that underused experts are selected more often.

        Args:
            updated: whether the step changed weights; otherwise the biases do not change either.

        Returns the load imbalance (see `update_router_biases`), or None for a dense model.
        """
        return update_router_biases(self.routers, updated)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialises the weights: norms with ones, all others from normal(0, initializer_range).

        A seed gives the same weights for any sharding. Parameters may be uninitialised memory from `to_empty`.
        """
        for number, module in enumerate(self.modules()):
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Router):
                module.e_score_correction_bias.zero_()
                module.tokens_per_expert.zero_()
            if isinstance(module, nn.Linear | nn.Embedding | Router | Experts):
                for name, weight in module.named_parameters(recurse=False):
                    self._fill(weight, f"{seed} {number} {name}")

    def _fill(self, weight: Tensor, key: str) -> None:
        """Fills a parameter with random numbers seeded by `key`; a shard gets its part of them."""
        generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(key.encode()))
        full = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        full.normal_(0.0, self.config.initializer_range, generator=generator)
        if isinstance(weight, DTensor):
            full = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(full)
