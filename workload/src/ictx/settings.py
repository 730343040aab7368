"""Typed settings from YAML files: unknown keys and wrong types are refused by name."""

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
"""Where the configs lie that come with the image, and with the checkout."""


def config_path(name: str) -> Path:
    """Returns the file: as given, or below the configs that come with the image or the checkout. Raises UserError."""
    for folder in (Path(), *SHIPPED):
        # A name that is too long, or holds a null, is no file's.
        with suppress(OSError, ValueError):
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"configuration {shown(name)} is neither here nor below {SHIPPED[0]}")


def shipped(pattern: str) -> list[Path]:
    """Returns the files of that pattern that come with the image or, where there are none, with the checkout."""
    return next((found for folder in SHIPPED if (found := sorted(folder.glob(pattern)))), [])


def load_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises UserError when there is none."""
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
    except Exception as error:  # PyYAML lets pass what int, datetime, re and the recursion limit raise
        raise UserError(f"{where}: not YAML: {type(error).__name__}: {shown(str(error))}") from error


def shown(value: object) -> str:
    """Returns a value for a message: one line, however long, deep or odd it is."""
    try:
        return value if isinstance(value, str) and value.isprintable() and len(value) < 200 else reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
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
            # What was given stays as it is.
            target[place] = target = found.copy()
        place, _ = _at(target, key, assignment)
        target[place] = _parsed(text, f"--set {shown(assignment)}")
    return result


def _at(target: dict[str, Any] | list[Any], step: str, assignment: str) -> tuple[Any, Any]:
    """Returns a section's key or a list's index, and what is there; a section that there is not is empty."""
    if isinstance(target, dict):
        return step, target.get(step, {})
    number = re.fullmatch(r"\[(\d{1,9})\]", step)
    if not number or int(number[1]) >= len(target):
        raise UserError(f"--set {shown(assignment)}: {shown(step)} is no element of a list of {len(target)}")
    return int(number[1]), target[int(number[1])]


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Returns the dataclass made of a mapping, nested dataclasses included.

    Raises UserError naming the key (`train.steps`), its value and what is allowed.
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
    """Returns values as the fields of a dataclass have them; some may be missing. Raises UserError as `build` does."""
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
    """Returns the value as `kind`: a dataclass, a plain type, one of several, a list or a mapping.

    Raises UserError naming the setting, or the element (`data.mix[1].weight`).
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
        # YAML 1.1 reads 3e-4 as text.
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
    """Returns the value as the first of several kinds that it fits."""
    if value is None and type(None) in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        with suppress(UserError):
            return _convert(kind, value, name)
    return _convert(last, value, name)


def _too_large(value: object) -> bool:
    """Whether a number is one that no setting means, and that most libraries cannot take."""
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as `section.key`: text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def command_line() -> argparse.ArgumentParser:
    """Returns the options of a command that reads a configuration, as a parent of its parser."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--config", required=True, help="YAML file, here or below the shipped configs")
    parent.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a setting")
    return parent
