"""Typed settings from YAML files: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import reprlib
import sys
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

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


def override(content: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Returns `content` with `section.key=value` assignments (values in YAML) applied. Raises UserError."""
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *sections, key = name.split(".")
        if not equals or not key:
            raise UserError(f"--set {shown(assignment)}: expected section.key=value")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {shown(assignment)}: {shown(section)} is not a section")
        target[key] = _parsed(text, f"--set {shown(assignment)}")
    return result


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Returns the dataclass made of a mapping, nested dataclasses included.

    Raises UserError naming the key (`train.steps`), its value and what is allowed.
    """
    hints = get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, 1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown setting {where}{shown(name)}: {hint}")
        arguments[name] = _convert(hints[name], value, f"{where}{name}")
    for name, field in known.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and name not in arguments:
            raise UserError(f"missing setting {where}{name}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{where}{error}") from error


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Returns the value as `kind`: a dataclass, a plain type or an optional one."""
    if get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"setting {name} is {_quoted(value)}: expected keys and values")
        return build(kind, value, f"{name}.")  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise UserError(f"setting {name} is {_quoted(value)}: expected a list")
        element, _ = get_args(kind)
        return tuple(_convert(element, each, f"{name}[{number}]") for number, each in enumerate(value))
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


def _too_large(value: object) -> bool:
    """Whether a number is one that no setting means, and that most libraries cannot take."""
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def command_line() -> argparse.ArgumentParser:
    """Returns the options of a command that reads a configuration, as a parent of its parser."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--config", required=True, help="YAML file, here or below the shipped configs")
    parent.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a setting")
    return parent
