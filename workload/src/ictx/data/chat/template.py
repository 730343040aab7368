"""Rendering of chat templates as in transformers, with the spans of the model's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ictx.data.chat.forms import Message
from ictx.errors import UserError
from ictx.settings import shown

Span = tuple[int, int]
"""First character and end (exclusive)."""


class Answers(Extension):
    """The block `generation`, which marks the model's answers."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.written: list[str] = []
        """Text rendered so far."""
        self.spans: list[Span] = []

    def parse(self, parser: Parser) -> Node:
        """Returns a call of `_block` with the block's content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Any) -> str:
        text = str(caller())
        start = sum(map(len, self.written))
        self.spans.append((start, start + len(text)))
        return text


class Template:
    """A compiled chat template."""

    def __init__(self, source: Any, special: Mapping[str, str]) -> None:
        """Compiles a template. Raises UserError if it is invalid.

        Args:
            source: Jinja source, or a list of `{"name": …, "template": …}`, of which `default` is used.
            special: variables for the template, such as `bos_token`.
        """
        if isinstance(source, list):
            source = _default(source)
        if not isinstance(source, str):
            raise UserError(f"the chat template is {shown(source)}: expected text")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Answers, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self.special = dict(special)
        (self._answers,) = (each for each in environment.extensions.values() if isinstance(each, Answers))
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # the parser recurses as deep as a template is nested
            raise _failed(error) from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Returns a conversation's text, and the spans in it that the template marks as the model's answers.

        Args:
            add_generation_prompt: whether to add the beginning of an answer.

        Raises UserError if the template fails.
        """
        written, spans = self._answers.written, self._answers.spans
        written.clear()
        spans.clear()
        given = {"messages": messages, "tools": None, "documents": None}
        try:
            for part in self._template.generate(self.special, **given, add_generation_prompt=add_generation_prompt):
                written.append(part)
        except Exception as error:  # expressions of a template can raise any exception
            raise _failed(error) from error
        return "".join(written), list(spans)


def _failed(error: Exception) -> UserError:
    return UserError(f"the chat template fails: {type(error).__name__}: {shown(str(error))}")


def _default(templates: list[Any]) -> Any:
    """Returns the template named `default`. Raises UserError if there is none."""
    named = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
    if "default" not in named:
        raise UserError(f"none of the chat templates {shown(list(named))} is named default")
    return named["default"]


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Returns JSON without escapes for HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    """Called by a template to reject a conversation."""
    raise TemplateError(message)
