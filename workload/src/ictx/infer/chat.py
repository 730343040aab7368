"""A chat template's text, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ictx.errors import UserError
from ictx.settings import shown


class Answer(Extension):
    """The block that marks what a model writes: it says nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """Returns what is in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: Any, text: str, special: Mapping[str, str]) -> str:
    """Returns a chat in which a user has said the text, up to the answer. Raises UserError where the template fails.

    Args:
        template: Jinja, or a list of such by name as `{"name": …, "template": …}`, of which `default` is taken.
        special: what a template may name, such as `bos_token`.
    """
    if isinstance(template, list):
        template = _default(template)
    if not isinstance(template, str):
        raise UserError(f"the chat template is {shown(template)}: expected text")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Answer, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda layout: datetime.now().strftime(layout)}
    given = {"messages": [{"role": "user", "content": text}], "tools": None, "documents": None}
    try:
        return environment.from_string(template).render(special, **given, add_generation_prompt=True)
    except Exception as error:  # a template can raise all that its expressions can
        raise UserError(f"the chat template fails: {type(error).__name__}: {shown(str(error))}") from error


def _default(templates: list[Any]) -> Any:
    """Returns the template of that name."""
    named = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
    if "default" not in named:
        raise UserError(f"of the chat templates, {shown(list(named))}, none is named default: leave --chat out")
    return named["default"]


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Returns JSON with its characters as they are: Jinja's own filter is for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    """What a template calls to refuse a chat."""
    raise TemplateError(message)
