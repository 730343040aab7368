"""Ansible filter: rules of preflight (meaning.py) about values of charts, using the schema that Helm applies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Problem = tuple[str, str, str]

CHARTS = Path(__file__).resolve().parents[3] / "charts"
LONGEST = 120  # characters of a schema error, with the value


@cache
def _chart(name: str) -> tuple[Mapping[str, Any], Any]:
    """Returns a chart's default values, and the validator of its schema."""
    # Imported here because many inventories set no values of charts.
    from jsonschema.validators import validator_for

    schema = json.loads((CHARTS / name / "values.schema.json").read_text())
    return yaml.safe_load((CHARTS / name / "values.yaml").read_text()), validator_for(schema)(schema)


def _merged(base: Any, own: Any) -> Any:
    """Returns values over others as Helm merges them: null removes a key, and lists are replaced."""
    if not isinstance(own, Mapping):
        return own
    under = base if isinstance(base, Mapping) else {}
    merged = {**under, **{key: _merged(under.get(key), value) for key, value in own.items()}}
    return {key: value for key, value in merged.items() if value is not None or key not in own}


def _texts(site: Any, chart: str, given: Any) -> Iterator[str]:
    base, validator = _chart(chart)
    remedy = f"charts/{chart}/README.md lists the values"
    for error in sorted(validator.iter_errors(_merged(base, given)), key=lambda error: str(error.json_path)):
        at = error.json_path.removeprefix("$").lstrip(".")
        if error.validator == "additionalProperties" and error.schema.get("additionalProperties") is False:
            known = [*error.schema.get("properties", {})]
            for key in (key for key in error.instance if key not in known):
                hint = site.close(key, known) or f": {remedy}"
                yield f"{at}{'.' if at else ''}{key} is not a value of charts/{chart}{hint}"
        else:
            text = error.message if len(error.message) <= LONGEST else f"{error.message[:LONGEST]}…"
            yield f"{at} is invalid: {text}: {remedy}"


def values(site: Any) -> Iterator[Problem]:
    """The values of every release are valid."""
    given = [
        (f"ictx_{name}_values", "", chart, site.get(f"ictx_{name}_values"))
        for name, chart in (("mlflow", "mlflow"), ("serving", "serving"), ("judge", "serving"))
    ]
    given += [
        ("ictx_serving_releases", f"{release['name']}: values.", "serving", release.get("values"))
        for release in site.get("ictx_serving_releases") or []
        if release.get("state") != "absent"
    ]
    for where, prefix, chart, own in given:
        try:
            for text in _texts(site, chart, own) if own else ():
                yield where, f"{prefix}{text}", ""
        except ImportError as error:
            yield where, f"cannot be validated on this control host ({error}): run scripts/bootstrap control", ""
            return


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (values,)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_charts": rules}
