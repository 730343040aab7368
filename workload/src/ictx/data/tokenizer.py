"""The tokenizer: byte-level BPE with tokens for the ends of documents and for the turns of a chat."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ictx.errors import UserError
from ictx.settings import shown

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# The last four are reserved, so that a later stage can use a new token without changing the vocabulary.
SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END, *(f"<|reserved_{number}|>" for number in range(4)))
"""Token ids are the positions in this list: `<|endoftext|>` is 0."""
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)

# Merges stay within: words with at most one preceding sign, one to three digits, runs of signs, of line ends or of
# spaces. A space belongs to the word after it.
WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# ChatML. A message cannot end its turn: a space is inserted into control tokens in it, which makes them plain text. The
# `generation` block marks the model's answers, for a loss on answers only.
_TEXT = "message['content']" + "".join(
    f" | replace('{token}', '{token[:-2]} |>')" for token in (TURN_START, TURN_END, END_OF_TEXT)
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('a message has the role ' ~ message['role'] ~ ': not system, user, assistant or tool') -}}"
    "{%- endif -%}"
    f"{{{{- '{TURN_START}' ~ message['role'] ~ '\\n' -}}}}"
    "{%- if message['role'] == 'assistant' -%}"
    f"{{%- generation -%}}{{{{- ({_TEXT}) ~ '{TURN_END}' -}}}}{{%- endgeneration -%}}"
    "{%- else -%}"
    f"{{{{- ({_TEXT}) ~ '{TURN_END}' -}}}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{TURN_START}assistant\\n' -}}}}{{%- endif -%}}"
)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a tokenizer of exactly `vocab_size` entries, the special tokens first. Raises UserError."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but the corpus yields only {tokenizer.get_vocab_size()} entries: "
            "lower it or add text"
        )
    return tokenizer


def read_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer in a folder, of any origin. Raises UserError.

    Resets truncation and padding, which a file keeps from the last calls before it was saved.
    """
    path = directory / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_str(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} is not a tokenizer: {shown(str(error))}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_fit(tokenizer: Tokenizer, vocab_size: int, name: object) -> None:
    """Raises UserError if a tokenizer has token ids without an embedding in a model of that vocabulary size."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{name} has tokens up to number {largest}, but the model's vocab_size is {vocab_size}")


def special_text(token: Any) -> str | None:
    """Returns the text of a special token in tokenizer_config.json (a string or an object); None if it has none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens that a tokenizer adds before and after every text, such as a begin-of-text token."""
    encoding = tokenizer.encode("a")
    added = encoding.special_tokens_mask
    first = next((place for place, special in enumerate(added) if not special), len(added))
    last = next((place for place in range(len(added), first, -1) if not added[place - 1]), first)
    return encoding.ids[:first], encoding.ids[last:]


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """Returns a tokenizer that ictx trained, from a folder. Raises UserError if it is not one."""
    path, tokenizer = directory / TOKENIZER_FILE, read_tokenizer(directory)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(f"vocab_size is {vocab_size}, but {path} has {tokenizer.get_vocab_size()} entries")
    require_fit(tokenizer, vocab_size, path)
    for number, text in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(text) != number:
            raise UserError(f"{path} has token {text} as {tokenizer.token_to_id(text)}: expected {number}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the two files (`TOKENIZER_FILES`) that transformers and vLLM read, including the chat template.

    The export of a model adds `model_max_length`, which depends on the model.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": list(SPECIAL_TOKENS[2:]),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True))
    (directory / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
