"""Instruction pairs that need no download: the functions of Python's standard library and their docstrings."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ictx.data.chat.config import Kind
from ictx.data.chat.records import Record

STDLIB = "stdlib"
"""The name of this source."""
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
INSTRUCTION = "Document this function:\n\n```python\n{}\n```"


def records(kind: Kind) -> Iterator[Record]:
    """Yields a record of each documented function: `messages`, or `prompt`, `chosen` and `rejected`.

    The instruction is to document the function, given its source without docstring; the answer is the docstring. The
    rejected answer is the first half of the docstring, or another function's docstring, selected by a hash.
    """
    found = list(documented())
    for number, (where, source, docstring) in enumerate(found):
        prompt = [{"role": "user", "content": INSTRUCTION.format(source)}]
        chosen = [{"role": "assistant", "content": docstring}]
        if kind == "sft":
            yield where, {"messages": prompt + chosen}
            continue
        key = int.from_bytes(hashlib.sha256(f"{source}\0{docstring}".encode()).digest()[:8], "big")
        rejected = _cut(docstring) if key % 2 else ""
        others = ((number + key // 2 + step) % len(found) for step in range(len(found)))
        rejected = rejected or next((found[n][2] for n in others if found[n][2] != docstring), "")
        yield where, {"prompt": prompt, "chosen": chosen, "rejected": [{"role": "assistant", "content": rejected}]}


def _cut(docstring: str) -> str:
    """Returns the first half of a text's words; empty if it has only one."""
    words = docstring.split()
    return docstring[: docstring.index(words[len(words) // 2], len(words[0]))].rstrip() if len(words) > 1 else ""


def documented(folder: Path | None = None) -> Iterator[tuple[str, str, str]]:
    """Yields location, source without docstring, and docstring of each documented function (default: Python's)."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.rglob("*.py")):
        if LEFT_OUT & set(file.relative_to(folder).parts):
            continue
        try:
            text = file.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, OSError):
            continue  # the library contains templates and files of other encodings
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = (ast.get_docstring(node) or "").strip()
                if docstring and len(node.body) > 1 and (source := _without_docstring(node, lines)):
                    yield f"{file} line {node.lineno}", source, docstring


def _without_docstring(node: Any, lines: list[str]) -> str:
    """Returns a function's source; empty if other code shares the docstring's lines."""
    first, docstring, rest = node.lineno - 1, node.body[0], node.body[1]
    if docstring.lineno == node.lineno or rest.lineno == docstring.end_lineno:
        return ""
    kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept))
