"""The model: DeepSeek-V3's architecture with Multi-head Latent Attention."""

from ictx.model.config import ModelConfig, MoeConfig, YarnConfig
from ictx.model.transformer import Transformer

__all__ = ["ModelConfig", "MoeConfig", "Transformer", "YarnConfig"]
