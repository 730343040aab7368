"""Models small enough for evaluations in tests, with tokenizers, and the command line in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from models import small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ictx.cli import main
from ictx.model import Transformer
from ictx.model.hf import save_pretrained

END, TURN = "<|endoftext|>", "<|im_end|>"
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def export(folder: Path, model: Transformer | None = None, **changes: object) -> Path:
    """Writes a model over bytes, with its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=END)
    wrapped.add_special_tokens({"additional_special_tokens": [TURN]})
    wrapped.chat_template = CHAT
    save_pretrained(model or small(vocab_size=258, **changes), folder, wrapped)
    return folder


def ictx(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["ictx", *map(str, arguments)])
    return main()
