"""Settings: lists of sections, and their errors with the index."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ictx.errors import UserError
from ictx.settings import build, override


@dataclass(frozen=True)
class Part:
    """An element."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Settings:
    """A section with lists."""

    parts: list[Part] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.95)
    layers: list[int] | None = None
    names: dict[str, int] = field(default_factory=dict)


def test_lists_hold_sections_and_plain_values() -> None:
    values = {
        "parts": [{"name": "a"}, {"name": "b", "weight": 2}],
        "betas": [1, 0.5],
        "layers": [0, 3],
        "names": {"x": 1},
    }
    expected = Settings([Part("a"), Part("b", 2.0)], (1.0, 0.5), [0, 3], {"x": 1})
    assert build(Settings, values) == expected


def test_an_element_is_set_by_its_index() -> None:
    given = {"parts": [{"name": "a"}, {"name": "b"}]}
    found = build(Settings, override(given, ["parts[1].weight=0.25", "layers=[7]"]))
    assert found == Settings([Part("a"), Part("b", 0.25)], layers=[7])
    assert given == {"parts": [{"name": "a"}, {"name": "b"}]}, "the argument must not change"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"parts": {"name": "a"}}, "setting parts is .*: expected a list"),
        ({"parts": [{"name": "a"}, "b"]}, r"setting parts\[1\] is 'b': expected keys and values"),
        (
            {"parts": [{"name": "a", "wieght": 2}]},
            r"unknown setting parts\[0\]\.wieght: did you mean parts\[0\]\.weight",
        ),
        ({"parts": [{"weight": 2}]}, r"missing setting parts\[0\]\.name"),
        ({"layers": [1, "two"]}, r"setting layers\[1\] is 'two': expected int"),
        ({"layers": [True]}, r"setting layers\[0\] is True: expected int"),
        ({"betas": [0.9]}, "setting betas has 1 elements: expected 2"),
        ({"names": {"x": "y"}}, r"setting names\.x is 'y': expected int"),
    ],
)
def test_a_wrong_element_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build(Settings, values)


@pytest.mark.parametrize("assignment", ["parts[2].name=c", "parts[x].name=c", "parts[-1].name=c", "parts.name=c"])
def test_an_element_that_is_not_there_is_named(assignment: str) -> None:
    with pytest.raises(UserError, match="is not an index of a list of 2"):
        override({"parts": [{"name": "a"}, {"name": "b"}]}, [assignment])
