"""A checkpoint's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ictx.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, read_tokenizer, special_text
from ictx.errors import UserError
from ictx.folder import read_text
from ictx.model.hf_config import read_object
from ictx.model.hf_generation import Generation
from ictx.settings import shown

if TYPE_CHECKING:
    from ictx.data.chat.template import Template


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's tokenizer, and the tokens that end generation."""

    tokenizer: Tokenizer
    stop: frozenset[int]
    chat_template: Any
    """Template from chat_template.jinja or tokenizer_config.json: a text, or several named ones; None if missing."""
    special: Mapping[str, str]
    """Special tokens available to templates, by name, such as `bos_token`."""

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Reads a checkpoint's folder. Raises UserError if it has no tokenizer, or a file is damaged."""
        if directory.is_dir() and not (directory / TOKENIZER_FILE).exists():
            raise UserError(f"{directory} has no {TOKENIZER_FILE}: the checkpoint was exported without a tokenizer")
        tokenizer = read_tokenizer(directory)
        settings: dict[str, Any] = {}
        for file in (directory / "special_tokens_map.json", directory / TOKENIZER_CONFIG_FILE):
            settings |= read_object(file) if file.exists() else {}
        texts = {name: special_text(token) for name, token in settings.items() if name.endswith("_token")}
        special = {name: text for name, text in texts.items() if text is not None}
        template_file = directory / "chat_template.jinja"
        template = read_text(template_file) if template_file.exists() else settings.get("chat_template")
        return cls(tokenizer, Generation.read(directory).stop, template, special)

    def template(self, file: Path | None = None) -> Template:
        """Returns the chat template, or the one in `file`. Raises UserError if there is none."""
        from ictx.data.chat.template import Template  # jinja2, which few commands need

        source = read_text(file) if file else self.chat_template
        if source is None:
            raise UserError("the checkpoint has no chat template: set chat_template to the path of a template file")
        return Template(source, self.special)

    def encode(self, text: str, chat: bool) -> list[int]:
        """Returns the tokens of a text, or of a chat with it as the user's turn.

        As in transformers, the tokenizer adds the special tokens of a text, and the template those of a chat. Raises
        UserError if `chat` is set without a template, or the text is not UTF-8.
        """
        if chat and self.chat_template is None:
            raise UserError("the checkpoint has no chat template: omit --chat")
        if chat:
            text, _ = self.template().render([{"role": "user", "content": text}], add_generation_prompt=True)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not UTF-8: {shown(str(error))}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=not chat).ids)

    def stream(self, tokens: Iterator[int], write: Callable[[str], object]) -> None:
        """Writes text as tokens arrive; a character of several tokens is written once it is complete."""
        decoder = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            text = decoder.step(self.tokenizer, token)
            if text:
                write(text)
