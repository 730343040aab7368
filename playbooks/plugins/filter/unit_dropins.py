"""Ansible filters: a site's settings of systemd units."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

# Sections that a drop-in may have, by type of unit. Not [Install]: it only has an effect when a unit is enabled.
SECTIONS = {
    "service": ("Unit", "Service"),
    "socket": ("Unit", "Socket"),
    "timer": ("Unit", "Timer"),
}


def whole_name(unit: str) -> str:
    """Returns a unit's name with its type, which defaults to service."""
    return unit if unit.rpartition(".")[2] in SECTIONS else f"{unit}.service"


def dropin_problems(dropins: Mapping[str, Any], units: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems in ictx_unit_dropins; directives are validated by systemd on the host.

    Args:
        dropins: sections by unit.
        units: known units.
    """
    for unit, sections in dropins.items():
        name = whole_name(unit)
        if name not in units:
            # Without the common suffix, which would make all names similar.
            known = [other.removesuffix(".service") for other in units]
            near = get_close_matches(unit.removesuffix(".service"), known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{unit} is not a unit of the platform{hint}"
        elif not isinstance(sections, Mapping):
            yield f"{unit} must be a dictionary of sections, such as {{Service: {{LimitNOFILE: 1048576}}}}"
        else:
            yield from _section_problems(unit, sections, SECTIONS[name.rpartition(".")[2]])


def _section_problems(unit: str, sections: Mapping[str, Any], known: Iterable[str]) -> Iterator[str]:
    for section, directives in sections.items():
        if section not in known:
            yield f"{unit} has the section {section}, which must be {' or '.join(known)}"
        elif not isinstance(directives, Mapping) or not directives:
            yield f"{unit} {section} must be a dictionary of directives, such as {{LimitNOFILE: 1048576}}"
        else:
            for name, value in directives.items():
                if not re.fullmatch("[A-Z][A-Za-z0-9]+", name):
                    yield f"{unit} {section} has {name}, which is not a valid name of a directive"
                if isinstance(value, Mapping) or any(isinstance(item, (Mapping, list)) for item in _lines(value)):
                    yield f"{unit} {section} {name} must be text, a number or a list of them"
                if any(str(item).endswith("\\") for item in _lines(value)):
                    yield f"{unit} {section} {name} ends with a backslash, which would join the next line"


def units_of_host(
    dropins: Mapping[str, Any], units: Mapping[str, Iterable[str]], groups: Iterable[str]
) -> dict[str, Any]:
    """Returns the settings of the units that run on a host in some groups, by full unit name."""
    named = {whole_name(unit): sections for unit, sections in dropins.items()}
    return {unit: sections for unit, sections in named.items() if {"all", *groups} & set(units[unit])}


def _lines(value: Any) -> list[Any]:
    return value if isinstance(value, list) else ["" if value is None else value]


def unit_file(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the sections as text of a unit file; a list becomes one line per item."""
    text = ""
    for section, directives in sections.items():
        text += f"[{section}]\n"
        for name, value in directives.items():
            for item in _lines(value):
                text += f"{name}={str(item).lower() if isinstance(item, bool) else item}\n"
    return text


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"dropin_problems": dropin_problems, "unit_file": unit_file, "units_of_host": units_of_host}
