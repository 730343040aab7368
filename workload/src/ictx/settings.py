"""Typed settings from YAML files: unknown keys and wrong types are rejected with the setting's name."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import reprlib
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ictx.errors import UserError

T = TypeVar("T")


SHIPPED = Path("/opt/ictx/configs"), Path(__file__).parents[2] / "configs"
"""Folders of the shipped configs: in the image, and in a checkout."""


def config_path(name: str) -> Path:
    """Returns a config's path: as given, or below the shipped configs. Raises UserError if there is none."""
    for folder in (Path(), *SHIPPED):
        # is_file raises for a name that is too long or contains a null byte.
        with suppress(OSError, ValueError):
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"configuration {shown(name)} does not exist: set a path, or the name of a config below {SHIPPED[0]}"
    )


def shipped(pattern: str) -> list[Path]:
    """Returns the shipped configs that match a glob pattern: those of the image, else those of the checkout."""
    return next((found for folder in SHIPPED if (found := sorted(folder.glob(pattern)))), [])


def load_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises UserError if the file cannot be read or is not a mapping."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error
    content = _parsed(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _parsed(text: str, where: str) -> Any:
    """Returns a YAML text's value. Raises UserError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {str(error).splitlines()[0]}") from error
    except Exception as error:  # PyYAML does not catch errors of int, datetime, re and the recursion limit
        raise UserError(f"{where}: not YAML: {type(error).__name__}: {shown(str(error))}") from error


def shown(value: object) -> str:
    """Returns a value for a message: one short line."""
    try:
        return value if isinstance(value, str) and value.isprintable() and len(value) < 200 else reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return f"a long {type(value).__name__}"


def _quoted(value: object) -> str:
    """Returns a value as it is written in Python."""
    return repr(value) if isinstance(value, str) and len(value) < 200 else shown(value)


def override(content: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Returns `content` with assignments applied: `section.key=value`, `section.list[0].key=value`; values in YAML.

    Raises UserError.
    """
    result = dict(content)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *sections, key = name.replace("[", ".[").split(".")
        if not equals or not key:
            raise UserError(f"--set {shown(assignment)}: expected section.key=value")
        target: Any = result
        for section in sections:
            place, found = _at(target, section, assignment)
            if not isinstance(found, dict | list):
                raise UserError(f"--set {shown(assignment)}: {shown(section)} is not a section")
            # Copied, so that the caller's content is not changed.
            target[place] = target = found.copy()
        place, _ = _at(target, key, assignment)
        target[place] = _parsed(text, f"--set {shown(assignment)}")
    return result


def _at(target: dict[str, Any] | list[Any], step: str, assignment: str) -> tuple[Any, Any]:
    """Returns a section's key or a list's index, and its value; the value of a missing key is an empty section."""
    if isinstance(target, dict):
        return step, target.get(step, {})
    number = re.fullmatch(r"\[(\d{1,9})\]", step)
    if not number or int(number[1]) >= len(target):
        raise UserError(f"--set {shown(assignment)}: {shown(step)} is not an index of a list of {len(target)}")
    return int(number[1]), target[int(number[1])]


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Returns a dataclass built from a mapping, including nested dataclasses.

    Raises UserError with the key (`train.steps`), its value and what is allowed.
    """
    arguments = typed(cls, values, where)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and field.name not in arguments:
            raise UserError(f"missing setting {where}{field.name}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}{error}") from error


def typed(cls: type[Any], values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Returns values converted to the types of a dataclass's fields; some may be missing. Raises UserError."""
    hints = get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, 1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown setting {where}{shown(name)}: {hint}")
        arguments[name] = _convert(hints[name], value, f"{where}{name}")
    return arguments


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Returns the value converted to `kind`: a dataclass, a plain type, a union, a list or a mapping.

    Raises UserError with the name of the setting or element (`data.mix[1].weight`).
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_one(arguments, value, name)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"setting {name} is {_quoted(value)}: expected keys and values")
        return build(kind, value, f"{name}.")  # type: ignore[arg-type]
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            raise UserError(f"setting {name} is {_quoted(value)}: expected a list")
        if origin is tuple and arguments[-1] is not ...:
            kinds = arguments
            if len(value) != len(kinds):
                raise UserError(f"setting {name} has {len(value)} elements: expected {len(kinds)}")
        else:
            kinds = (arguments[0],) * len(value)
        found = [_convert(each, value[number], f"{name}[{number}]") for number, each in enumerate(kinds)]
        return tuple(found) if origin is tuple else found
    if origin in (dict, Mapping):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError(f"setting {name} is {_quoted(value)}: expected keys and values")
        return {key: _convert(arguments[1], each, f"{name}.{shown(key)}") for key, each in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"setting {name} is {_quoted(value)}: expected one of {', '.join(map(str, arguments))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is float and isinstance(value, str):
        # In YAML 1.1, 3e-4 is a string.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is Path and isinstance(value, str) and value.isprintable():
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or _too_large(value):
        raise UserError(f"setting {name} is {_quoted(value)}: expected {kind.__name__}")
    return value


def _convert_to_one(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    """Returns the value converted to the first of several types that accepts it."""
    if value is None and type(None) in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        with suppress(UserError):
            return _convert(kind, value, name)
    return _convert(last, value, name)


def _too_large(value: object) -> bool:
    """Whether a value is an integer outside 64 bits, which most libraries reject."""
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as a flat mapping of `section.key` to text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def command_line() -> argparse.ArgumentParser:
    """Returns a parent parser with the options of commands that read a configuration."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--config", required=True, help="YAML file: a path, or a name below the shipped configs")
    parent.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    return parent
