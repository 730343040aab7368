"""The model: DeepSeek-V3's architecture with Multi-head Latent Attention, and its latent cache."""

from ictx.model.cache import LatentCache
from ictx.model.config import ModelConfig, MoeConfig, YarnConfig
from ictx.model.transformer import Transformer

__all__ = ["LatentCache", "ModelConfig", "MoeConfig", "Transformer", "YarnConfig"]
