"""This model as components of torchtune 0.6.1, for `tune run full_finetune_single_device --config torchtune/tiny.yaml`.

torchtune is not maintained any more, and requires a torchao of its time: `scripts/bootstrap torchtune` makes an
environment for it. The maintained way is `ictx train sft`.
"""

from ictx.torchtune.checkpointer import Checkpointer
from ictx.torchtune.model import model
from ictx.torchtune.tokenizer import ChatTokenizer

__all__ = ["ChatTokenizer", "Checkpointer", "model"]
