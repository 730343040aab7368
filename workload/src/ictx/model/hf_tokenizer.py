"""Writes a tokenizer's files to a model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ictx.data.tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_tokenizer,
    require_fit,
    special_text,
)
from ictx.model.hf_config import read_object
from ictx.model.hf_generation import TURN_END

OTHER_FILES = ("special_tokens_map.json", "chat_template.jinja")


def write_tokenizer(
    directory: Path, tokenizer: Any, longest: int, vocab_size: int, end_of_text: str | None = None
) -> dict[str, int]:
    """Writes a tokenizer's files to a folder; returns the ids of its special tokens by role (`eos_token`, …).

    Args:
        tokenizer, end_of_text: see `ictx.model.hf.save_pretrained`; without a tokenizer nothing is written.
        longest: the model's maximum context in tokens.
        vocab_size: the model's vocabulary size.

    Raises UserError naming a damaged file, or a tokenizer with more entries than the model.
    """
    if tokenizer is None:
        return {}
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(directory)
    else:
        source = Path(tokenizer)
        folder = source if source.is_dir() else source.parent
        shutil.copyfile(folder / TOKENIZER_FILE if source.is_dir() else source, directory / TOKENIZER_FILE)
        for name in (TOKENIZER_CONFIG_FILE, *OTHER_FILES):
            if (folder / name).exists():
                shutil.copyfile(folder / name, directory / name)
    path = directory / TOKENIZER_CONFIG_FILE
    settings: dict[str, Any] = read_object(path) if path.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end_of_text:
        settings = {"eos_token": end_of_text, "pad_token": end_of_text} | settings
    # vLLM silently limits the context to this length.
    settings["model_max_length"] = longest
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    made = read_tokenizer(directory)
    require_fit(made, vocab_size, "the tokenizer")
    roles = {role: special_text(settings.get(role)) for role in ("eos_token", "pad_token")} | {TURN_END: TURN_END}
    numbers = {role: made.token_to_id(text) for role, text in roles.items() if text}
    return {role: number for role, number in numbers.items() if number is not None}
