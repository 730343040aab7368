"""Prompts, rubrics and parser of the package Prometheus-Eval (arXiv:2405.01535), unchanged.

The package itself cannot be imported: its client, which is not used here, requires a `fastchat` that is not the
well-known package of that name. Its modules of prompts and of the parser have no dependencies.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from ictx.errors import UserError
from ictx.manifest import read_json

VERSION = "0.1.20"
Mode = Literal["absolute", "relative"]


@cache
def _module(name: str) -> ModuleType:
    """Returns a module of the package without running the package. Raises UserError if it is not installed."""
    package = importlib.util.find_spec("prometheus_eval")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"prometheus-eval is not installed: pip install --no-deps prometheus-eval=={VERSION}")
    file = Path(package.submodule_search_locations[0], f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_prometheus_eval_{name}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rubric(name: str, mode: Mode) -> str:
    """Returns a rubric of the package by name, or that of a JSON file in its format.

    The file has `criteria` and `score1_description` to `score5_description`. Raises UserError.
    """
    prompts = _module("prompts")
    if not name.endswith(".json"):
        try:
            return str(prompts.load_rubric(name, mode))
        except ValueError:
            known = "helpfulness, harmlessness, honesty, factual_validity, reasoning"
            raise UserError(f"rubric is {name!r}: expected one of {known}, or a .json file") from None
    content = read_json(Path(name))
    try:
        text = str(prompts.SCORE_RUBRIC_TEMPLATE.format(**content))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{name} lacks {error}: expected criteria and score1_description to score5_description"
        ) from error
    return text if mode == "absolute" else text.partition("\n")[0]


def absolute_prompt(instruction: str, answer: str, reference: str | None, rubric: str) -> str:
    """Returns the user message that requests a grade of 1 to 5.

    It begins with the package's system prompt, because chat templates of the Mistral family reject system messages.
    """
    prompts = _module("prompts")
    template = str(prompts.get_prompt_template("absolute", reference is not None))
    filled = template.format(instruction=instruction, response=answer, reference_answer=reference, rubric=rubric)
    return f"{prompts.ABS_SYSTEM_PROMPT}\n\n{filled}"


def relative_prompt(instruction: str, a: str, b: str, reference: str | None, rubric: str) -> str:
    """Returns the user message that requests the better of two answers, A or B; see `absolute_prompt`."""
    prompts = _module("prompts")
    template = str(prompts.get_prompt_template("relative", reference is not None))
    filled = template.format(
        instruction=instruction, response_A=a, response_B=b, reference_answer=reference, rubric=rubric
    )
    return f"{prompts.REL_SYSTEM_PROMPT}\n\n{filled}"


def verdict(text: str, mode: Mode) -> int | str | None:
    """Returns the grade (1 to 5) or the better answer (A, B) at the end of a judge's text; None if there is none."""
    _, found = _module("parser").parse_output(text, mode)
    return None if found is None else int(found) if mode == "absolute" else str(found)


def grammar(mode: Mode, feedback: int) -> str:
    """Returns a regular expression of the format that the prompts require, with at most `feedback` characters of it.

    A server that supports it (vLLM's `structured_outputs`) can enforce the format for judges that are too small to
    follow it. This makes their texts parseable, but does not improve the grades.
    """
    return rf"[A-Za-z ,.']{{10,{feedback}}} \[RESULT\] {'[1-5]' if mode == 'absolute' else '[AB]'}"


def row(line: str, where: str) -> tuple[str, str | None]:
    """Returns the instruction and the reference answer, if any, in a line of JSON.

    Either `{"instruction", "reference"}`, or a chat `{"messages"}` that ends with the reference. Raises UserError.
    """
    try:
        content = json.loads(line)
        if "messages" in content:
            turns = content["messages"]
            reference = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
            instruction = next(turn["content"] for turn in reversed(turns) if turn["role"] == "user")
        else:
            instruction, reference = content["instruction"], content.get("reference")
        if not isinstance(instruction, str) or not instruction.strip() or not isinstance(reference, str | None):
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        expected = '{"instruction": text, "reference": text} or {"messages": [{"role": …, "content": …}, …]}'
        raise UserError(f"{where}: expected {expected}") from error
    return instruction, reference
