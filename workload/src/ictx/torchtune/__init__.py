"""This model as components of torchtune 0.6.1, for `tune run full_finetune_single_device --config torchtune/tiny.yaml`.

torchtune is no longer maintained and requires an old version of torchao: `scripts/bootstrap torchtune` creates an
environment for it. `ictx train sft` is the maintained alternative.
"""

from ictx.torchtune.checkpointer import Checkpointer
from ictx.torchtune.model import model
from ictx.torchtune.tokenizer import ChatTokenizer

__all__ = ["ChatTokenizer", "Checkpointer", "model"]
