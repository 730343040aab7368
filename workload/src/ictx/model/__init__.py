"""The model: DeepSeek-V3's architecture with Multi-head Latent Attention."""

from typing import TYPE_CHECKING, Any

from ictx.model.config import ModelConfig, MoeConfig, YarnConfig

if TYPE_CHECKING:
    from ictx.model.transformer import Transformer

__all__ = ["ModelConfig", "MoeConfig", "Transformer", "YarnConfig"]


def __getattr__(name: str) -> Any:
    """Imports the model on first use: importing torch takes seconds, and `ictx --help` imports this package."""
    if name != "Transformer":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from ictx.model.transformer import Transformer

    return Transformer
