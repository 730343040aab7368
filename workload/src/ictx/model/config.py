"""Model configuration, with the names of DeepSeek-V3's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ictx.errors import UserError
from ictx.settings import build, config_path, load_yaml

LATENT_NORM_EPS = 1e-6
"""Epsilon in the norms of the latents. DeepSeek's code and transformers use this value regardless of rms_norm_eps."""


def require_positive(config: object, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is not a finite number above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}: expected more than 0")


def require_at_least(config: object, least: int, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is not a finite number ≥ `least`."""
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}: expected {least} or more")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN, which extends rotary positions beyond the length that a model was trained on (arXiv:2309.00071)."""

    factor: float
    """Extended context divided by `original_max_position_embeddings`."""
    original_max_position_embeddings: int
    """Maximum context before extension, in tokens."""
    beta_fast: float = 32.0
    """Dimensions that rotate more often than this over the original context are not interpolated."""
    beta_slow: float = 1.0
    """Dimensions that rotate less often than this are fully interpolated."""
    mscale: float = 1.0
    """Weight of the length in the scale of cosine and sine."""
    mscale_all_dim: float = 1.0
    """Weight of the length in the scale of the softmax; 0: no scaling."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "factor", "original_max_position_embeddings")
        require_positive(self, "beta_fast", "beta_slow", "mscale")
        require_at_least(self, 0, "mscale_all_dim")
        if self.mscale_all_dim == 0 and self.mscale != 1:
            # transformers then uses 1 for mscale, vLLM the given value.
            raise ValueError(f"mscale is {self.mscale}: expected 1 if mscale_all_dim is 0")
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast}: expected at least beta_slow, {self.beta_slow}")


@dataclass(frozen=True)
class MoeConfig:
    """DeepSeekMoE: shared and routed experts instead of feed-forward layers (arXiv:2412.19437, section 2.1.2)."""

    n_routed_experts: int
    """Routed experts per layer."""
    num_experts_per_tok: int
    """Routed experts selected per token."""
    moe_intermediate_size: int
    """Width of an expert."""
    n_shared_experts: int = 1
    """Experts that process every token, computed as one expert of this many times the width."""
    n_group: int = 1
    """Groups of routed experts; DeepSeek-V3 was trained with one group per node."""
    topk_group: int = 1
    """Groups selected per token: those whose two best experts have the highest sum of scores."""
    first_k_dense_replace: int = 1
    """Dense layers at the start."""
    norm_topk_prob: bool = True
    """Whether the weights of the selected experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the selected experts."""
    bias_update_speed: float = 0.001
    """Change of an expert's bias per training step if it got too few or too many tokens."""
    balance_loss_weight: float = 0.0001
    """Weight of the sequence-wise balance loss."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_shared_experts",
            "n_group",
            "topk_group",
        )
        require_at_least(self, 0, "first_k_dense_replace", "bias_update_speed", "balance_loss_weight")
        require_positive(self, "routed_scaling_factor")
        if self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group:
            raise ValueError(
                f"n_group is {self.n_group}: expected to divide n_routed_experts, {self.n_routed_experts}, into groups "
                "of at least 2"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}: expected at most n_group, {self.n_group}")
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: expected at most {reachable}, the experts of "
                "topk_group groups"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 model; dense unless `moe` is set."""

    vocab_size: int
    """Entries of the vocabulary."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the dense feed-forward layers."""
    num_hidden_layers: int
    """Number of layers."""
    num_attention_heads: int
    """Attention heads."""
    q_lora_rank: int | None = None
    """Rank of the query's low-rank projection; none: one full-rank projection."""
    kv_lora_rank: int = 512
    """Width of the latent that is cached instead of keys and values."""
    qk_nope_head_dim: int = 128
    """Width of a head's query and key without position."""
    qk_rope_head_dim: int = 64
    """Width of the rotary part of query and key; the key's is shared by all heads."""
    v_head_dim: int = 128
    """Width of a head's value."""
    max_position_embeddings: int = 4096
    """Maximum context, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the norms, added to the mean square; the norms of the latents always use LATENT_NORM_EPS."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    num_nextn_predict_layers: int = 0
    """Multi-token prediction modules (MTP), each predicting one more token; used in training, not exported."""
    mtp_loss_weight: float = 0.3
    """Weight of the loss of those modules."""
    yarn: YarnConfig | None = None
    """Context extension, or none."""
    moe: MoeConfig | None = None
    """Mixture of experts, or none for a dense model."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
            "initializer_range",
        )
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}: expected more than 0, or none")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: expected an even number")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}: expected more than 1")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ValueError(f"num_nextn_predict_layers is {self.num_nextn_predict_layers}: expected 0 or 1")
        require_at_least(self, 0, "mtp_loss_weight")
        if self.yarn and self.yarn.factor * self.yarn.original_max_position_embeddings != self.max_position_embeddings:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}: expected yarn.factor × "
                f"yarn.original_max_position_embeddings = "
                f"{self.yarn.factor * self.yarn.original_max_position_embeddings:.0f}"
            )
        if self.moe and self.moe.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"moe.first_k_dense_replace is {self.moe.first_k_dense_replace}: expected at most num_hidden_layers, "
                f"{self.num_hidden_layers}"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key, with both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Cached values per token and layer: the normed latent, then the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores: qk_head_dim^-½ · m², m = 0.1 · mscale_all_dim · ln(factor) + 1 with YaRN."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        if self.yarn and self.yarn.factor > 1:
            m = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0
            scale *= m * m
        return scale

    def layer_moe(self, layer: int) -> MoeConfig | None:
        """Returns the expert configuration of a layer, or None if it is dense."""
        return self.moe if self.moe and layer >= self.moe.first_k_dense_replace else None

    @classmethod
    def from_yaml(cls, path: Path | str) -> ModelConfig:
        """Reads a YAML file. Raises UserError naming the file and the invalid setting."""
        content = load_yaml(Path(path))
        try:
            return build(cls, content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """Reads a YAML file, or the shipped configuration of that name. Raises UserError as `from_yaml` does."""
        return cls.from_yaml(name if Path(name).is_file() else config_path(f"model/{name}.yaml"))
