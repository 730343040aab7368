"""Input formats of conversations and preferences, and the format in which they are stored.

A conversation is a list of messages `{"role": ROLE, "content": TEXT}`. A row for SFT is `{"messages": CONVERSATION}`
that ends with an answer; a row for DPO is `{"prompt": MESSAGES, "chosen": [ANSWER], "rejected": [ANSWER]}`, where an
answer may have several messages.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from ictx.settings import shown

Message = dict[str, str]
Row = dict[str, list[Message]]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Roles that may follow a role; those of the first message are under the empty string."""


class BadRow(Exception):
    """A row without a usable conversation."""

    def __init__(self, why: str, detail: str = "") -> None:
        """Args: `why`: one of few reasons, by which skipped rows are counted; `detail`: specific to this row."""
        super().__init__(f"{why}: {detail}" if detail else why)
        self.why, self.detail = why, detail


def sft_row(record: Any) -> Row:
    """Returns a row for SFT.

    Accepts `messages`; ShareGPT's `conversations` with `from` and `value`, and optionally a separate `system` text;
    Alpaca's `instruction`, `input` and `output` (the first two become one turn, joined by a line break); and TRL's
    `prompt` with `completion`, each a text or messages. Raises BadRow.
    """
    record = _object(record)
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
    elif "conversations" in record:
        messages = _with_system(record, _messages(record["conversations"], "conversations"))
    elif "instruction" in record and "output" in record:
        asked = [_text(record[name], name) for name in ("instruction", "input") if record.get(name)]
        if not asked:
            raise BadRow("empty question", "instruction and input hold no text")
        answer = {"role": "assistant", "content": _text(record["output"], "output")}
        messages = _with_system(record, [{"role": "user", "content": "\n".join(asked)}, answer])
    elif "prompt" in record and "completion" in record:
        messages = _turns(record, "prompt", "user") + _turns(record, "completion", "assistant")
    else:
        raise BadRow(
            "no messages",
            "expected messages, conversations (ShareGPT), instruction and output (Alpaca), or prompt and completion; "
            f"it has {shown(', '.join(map(str, record))) or 'nothing'}",
        )
    _check_order(messages)
    return {"messages": messages}


def dpo_row(record: Any) -> Row:
    """Returns a row for DPO.

    Accepts TRL's formats: `prompt`, `chosen` and `rejected`, each a text or messages. If both answers are conversations
    that begin with the prompt, `prompt` may be missing. Raises BadRow.
    """
    record = _object(record)
    if "chosen" not in record or "rejected" not in record:
        raise BadRow("no chosen and rejected", f"it has {shown(', '.join(map(str, record))) or 'nothing'}")
    chosen, rejected = (_turns(record, name, "assistant") for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    prompt = _turns(record, "prompt", "user") if record.get("prompt") else []
    if prompt and all(answer[: len(prompt)] == prompt for answer in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    alike = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
    chosen, rejected = chosen[len(alike) :], rejected[len(alike) :]
    prompt = _with_system(record, prompt + alike)
    if not prompt:
        raise BadRow("no prompt", "expected prompt, or chosen and rejected conversations with a common beginning")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BadRow("empty answer", f"{name} has no message after the common beginning")
        try:
            _check_order(prompt + answer)
        except BadRow as error:
            raise BadRow(error.why, f"{name}: {error.detail}") from error
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


READ: dict[str, Callable[[Any], Row]] = {"sft": sft_row, "dpo": dpo_row}
"""Converters from an entry of a file to a row, by the kind of the data."""


def prompt_of(row: Row) -> list[Message]:
    """Returns the messages before the first answer; rows with equal ones belong to the same split."""
    messages = row.get("prompt") or row["messages"]
    return list(takewhile(lambda message: message["role"] != "assistant", messages))


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRow("no JSON object", shown(record))
    return record


def _turns(record: dict[str, Any], name: str, role: str) -> list[Message]:
    """Returns a list of messages as it is, or a text as one message."""
    value = record[name]
    return _messages(value, name) if isinstance(value, list) else [{"role": role, "content": _text(value, name)}]


def _with_system(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Returns messages, preceded by the separate system text, if any."""
    text = record.get("system") or record.get("system_prompt")
    return [{"role": "system", "content": _text(text, "system")}, *messages] if text else messages


def _messages(value: Any, name: str) -> list[Message]:
    """Returns messages with normalised roles."""
    if not isinstance(value, list) or not value:
        raise BadRow("no messages", f"{name} is {shown(value)}, expected a list of them")
    return [_message(message, f"{name}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow("no messages", f"{name} is {shown(message)}, expected a role and content")
    role = message.get("role", message.get("from"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow("unknown role", f"{name} has the role {shown(role)}, expected {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise BadRow("tool calls", f"{name} has tool_calls, expected content alone")
    return {"role": role, "content": _text(message.get("content", message.get("value")), f"{name}.content")}


def _text(value: Any, name: str) -> str:
    """Returns a text, or the texts of a list of parts `{"type": "text", "text": TEXT}`."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        value = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(value, str):
        raise BadRow("no text", f"{name} is {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8", f"{name} holds half of a surrogate pair") from error
    return value


def _check_order(messages: list[Message]) -> None:
    """Raises BadRow unless roles are in a valid order, the last is assistant, and no question or answer is empty."""
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in FOLLOWS[before]:
            after = f"after {before}" if before else "first"
            wanted = " or ".join(FOLLOWS[before])
            raise BadRow("wrong order of roles", f"message {number} has the role {role}, expected {wanted} {after}")
        if not message["content"].strip() and role in ("assistant", "user"):
            raise BadRow(f"empty {'answer' if role == 'assistant' else 'question'}", f"message {number} has no content")
        before = role
    if before != "assistant":
        raise BadRow("wrong order of roles", f"the last message has the role {before}, expected assistant")
