"""The model: DeepSeek-V3's dense architecture with Multi-head Latent Attention."""

from ictx.model.config import ModelConfig
from ictx.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]
