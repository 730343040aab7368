"""Special tokens and sampling parameters of a checkpoint: generation_config.json and a part of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.model.hf_config import CONFIG_FILE, DEFAULT_TOKENS, read_object

GENERATION_FILE = "generation_config.json"
TURN_END = "<|im_end|>"
"""Ends the model's turn in a chat, if the vocabulary contains it."""


@dataclass(frozen=True)
class Generation:
    """A checkpoint's settings for text generation."""

    tokens: Mapping[str, Any]
    """config.json's `bos_token_id`, `eos_token_id` and `pad_token_id`."""
    settings: Mapping[str, Any]
    """Content of generation_config.json. Exports preserve all keys, such as temperature."""

    @property
    def stop(self) -> frozenset[int]:
        """Tokens that end generation: those of generation_config.json, or else of config.json."""
        ends = self.settings.get("eos_token_id")
        ends = self.tokens.get("eos_token_id") if ends is None else ends
        return frozenset(_numbers(ends))

    @classmethod
    def of(cls, special: Mapping[str, int]) -> Generation:
        """Returns a new model's settings, from the ids of its tokenizer's `eos_token`, `pad_token` and TURN_END."""
        end, padding = special.get("eos_token"), special.get("pad_token")
        stops = sorted({number for number in (end, special.get(TURN_END)) if number is not None})
        tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": padding}
        return cls(tokens, {"do_sample": False, "pad_token_id": padding, "eos_token_id": stops or None})

    @classmethod
    def read(cls, directory: Path) -> Generation:
        """Reads the settings of a checkpoint, or of a tokenizer's folder. Raises UserError naming a damaged file."""
        config, file = directory / CONFIG_FILE, directory / GENERATION_FILE
        tokens: dict[str, Any] = dict.fromkeys(DEFAULT_TOKENS)
        if config.exists():
            content = read_object(config)
            tokens = {name: content.get(name, default) for name, default in DEFAULT_TOKENS.items()}
        # The defaults that transformers derives from config.json.
        settings = read_object(file) if file.exists() else {"do_sample": False} | tokens
        for path, values in ((config, tokens), (file, settings)):
            for name in DEFAULT_TOKENS:
                if not all(type(number) is int and number >= 0 for number in _numbers(values.get(name))):
                    raise UserError(f"{path}: {name} is {values[name]!r}: expected a token id, or a list of token ids")
        return cls(tokens, settings)


def _numbers(value: Any) -> list[Any]:
    """Returns a number, a list of numbers or None as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
