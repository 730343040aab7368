"""A dense DeepSeek-V3 (arXiv:2412.19437, section 2.1). Module names are those of its published weights."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ictx.model.config import ModelConfig
from ictx.model.rope import rotate, rotations


class LatentAttention(nn.Module):
    """Multi-head Latent Attention, expanded: keys and values are made of the latent before the heads attend."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, self.config = config.num_attention_heads, config
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, latent, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x_bsd: Tensor, rotations_sd: Tensor) -> Tensor:
        """Returns the attended values, of the shape and dtype of `x_bsd`."""
        config, heads = self.config, self.config.num_attention_heads
        q_bshd = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_bsd))).unflatten(-1, (heads, -1))
        q_nope, q_rope = q_bshd.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_bsd).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        kv_bshd = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v_bshd = kv_bshd.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        # One rotary key for all heads.
        k_rope = rotate(k_rope[:, :, None, :], rotations_sd).expand(-1, -1, heads, -1)
        query = torch.cat([q_nope, rotate(q_rope, rotations_sd)], -1)
        key = torch.cat([k_nope, k_rope], -1)
        out_bhsd = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            v_bshd.transpose(1, 2),
            is_causal=True,
            scale=config.softmax_scale,
        )
        return cast(Tensor, self.o_proj(out_bhsd.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_bsd: Tensor) -> Tensor:
        """Returns down(silu(gate(x)) · up(x)), of the shape and dtype of `x_bsd`."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x_bsd)) * self.up_proj(x_bsd)))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_bsd: Tensor, rotations_sd: Tensor) -> Tensor:
        """Returns the residual stream after this layer."""
        x_bsd = x_bsd + self.self_attn(self.input_layernorm(x_bsd), rotations_sd)
        return cast(Tensor, x_bsd + self.mlp(self.post_attention_layernorm(x_bsd)))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """Returns the normed residual stream of shape (batch, sequence, hidden_size)."""
        x_bsd = self.embed_tokens(tokens_bs)
        rotations_sd = rotations(self.config, torch.arange(tokens_bs.shape[1], device=tokens_bs.device))
        for layer in self.layers:
            x_bsd = layer(x_bsd, rotations_sd)
        return cast(Tensor, self.norm(x_bsd))


class Transformer(nn.Module):
    """A causal language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """Returns the logits of each next token, of shape (batch, sequence, vocab_size)."""
        return cast(Tensor, self.lm_head(self.model(tokens_bs)))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills the weights: norms with ones, everything else normal(0, initializer_range), the same for each seed."""
        generator = torch.Generator(device=self.lm_head.weight.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
