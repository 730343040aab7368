"""Ansible filter: lines KEY=VALUE with a site's overrides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def merge_settings(text: str, own: Mapping[str, Any]) -> str:
    """Returns the lines with some values replaced; keys ignore case, and null removes a key.

    A list is joined with commas, and a new key is appended.
    """
    left = {key.lower(): (key, value) for key, value in own.items()}
    lines = []
    for line in text.splitlines():
        found = re.match(r"(\w+)=", line)
        key, value = left.pop(found[1].lower(), ("", line)) if found else ("", line)
        if not key:
            lines.append(line)
        elif value is not None:
            lines.append(f"{key}={_written(value)}")
    lines += [f"{key}={_written(value)}" for key, value in left.values() if value is not None]
    return "\n".join(lines) + "\n"


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"merge_settings": merge_settings}
