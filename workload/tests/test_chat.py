"""Chat templates render as in transformers, and an error of a template is one line."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ictx.data.chat.template import Template
from ictx.errors import UserError
from ictx.infer.vocabulary import Vocabulary

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT = 'grün <&> "x"'


def render(template: Any, text: str, special: dict[str, str]) -> str:
    return Template(template, special).render([{"role": "user", "content": text}], add_generation_prompt=True)[0]


def theirs(template: Any) -> str:
    """Returns the template as transformers renders it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **SPECIAL)
    messages = [{"role": "user", "content": TEXT}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m['content'] }}{{ eos_token }}{% endfor %}",
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}"
        "{% endfor %}",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
        "  {% if tools is none and documents is none and add_generation_prompt %}\n  go\n  {% endif %}\n",
        "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
        "{{ strftime_now('%Y') }}{{ nothing }}",
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}],
    ],
)
def test_templates_render_as_in_transformers(template: Any) -> None:
    assert render(template, TEXT, SPECIAL) == theirs(template)


def test_the_date_is_today_s() -> None:
    assert render("{{ strftime_now('%Y') }}", TEXT, {}) in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('system messages are not supported') }}", "TemplateError: system messages are not supp"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{% if 1 %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ strftime_now(1) }}", "TypeError"),
        ([{"name": "rag", "template": ""}], r"none of the chat templates \['rag'\] is named default"),
        ([], "is named default"),
        ([3], "is named default"),
        (7, "the chat template is 7: expected text"),
        ({"default": "x"}, "the chat template is {'default': 'x'}: expected text"),
    ],
)
def test_a_template_that_fails_is_one_line(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        render(template, TEXT, SPECIAL)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_text_that_no_tokenizer_takes_is_one_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "\ud800"}))
    with pytest.raises(UserError, match="the prompt is not UTF-8"):
        Vocabulary.load(tmp_path).encode("a", chat=True)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja is not UTF-8: byte 0 is 0xff"):
        Vocabulary.load(tmp_path)
