"""The export's tokenizer and chat template as torchtune's `ModelTokenizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ictx.data.chat.forms import Message
from ictx.data.chat.tokens import encoded, numbers
from ictx.infer.vocabulary import Vocabulary

ROLES = {"ipython": "tool"}
"""torchtune's role names, mapped to those of chat templates."""


class ChatTokenizer:
    """Encodes conversations; tokens that the template does not mark as an answer are masked."""

    def __init__(self, path: str, max_seq_len: int | None = None) -> None:
        """Args: `path` is an export's folder. Raises UserError if it has no tokenizer or no template."""
        vocabulary = Vocabulary.load(Path(path))
        self._tokenizer, self._template = vocabulary.tokenizer, vocabulary.template()
        self.max_seq_len = max_seq_len
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        self.pad_id = self._tokenizer.token_to_id(vocabulary.special.get("pad_token", "")) or 0

    def tokenize_messages(self, messages: Sequence[Any], **_: Any) -> tuple[list[int], list[bool]]:
        """Returns tokens, at most `max_seq_len`, and whether each is masked; messages are torchtune's `Message`."""
        turns: list[Message] = [
            {"role": ROLES.get(each.role, each.role), "content": str(each.text_content)} for each in messages
        ]
        (found,) = encoded([{"messages": turns}], self._tokenizer, self._template)
        found = found[: self.max_seq_len]
        return numbers(found).tolist(), (found < 0).tolist()

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Returns a sample with `tokens` and `mask` instead of `messages`."""
        tokens, mask = self.tokenize_messages(sample["messages"])
        rest = {name: value for name, value in sample.items() if name != "messages"}
        return rest | {"tokens": tokens, "mask": mask}
