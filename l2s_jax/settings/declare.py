"""How settings are declared: beside each default its range or choice, and its meaning.

    @dataclasses.dataclass(frozen=True)
    class Latency(Section):
        batch_size: int = setting(8, "The larger batch, beside batch 1.", at_least=1)

A section cannot hold another value: `Latency(batch_size=0)` is the error "batch_size=0: expected
an integer >= 1".
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# What programs compute with has 32 bits.
_MOST_INT = 2**31 - 1
_MOST_FLOAT = 3.4e38
_TOO_LARGE = "it does not fit into 32 bits"

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    tuple: "a tuple",
    dict: "a mapping",
}


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a setting may be.

    kind: bool, int, float, str, tuple or dict.
    fits: asked about values of that kind; a ValueError of it says what is wrong.
    expected: what fits, in words.
    refused: values that people try, and why they are not among those that fit.
    is_path: whether a "~" that it begins with is the home folder.
    """

    kind: type
    fits: Callable[[Any], bool]
    expected: str
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_path: bool = False

    def checked(self, name: str, value: Any) -> Any:
        """The value; a float of an integer, and tuples of lists, where floats and tuples belong,
        and a path that begins at the root where it began at home.

        Raises:
          ValueError: it does not fit; `name` says whose value it is.
        """
        if isinstance(value, str) and value in self.refused:
            raise ValueError(f"{name}={value!r}: {self.refused[value]}")
        problem = ""
        try:
            converted = _as(self.kind, value)
            if self.fits(converted):
                return os.path.expanduser(converted) if self.is_path else converted
        except ValueError as error:
            problem = f"{error}; " if str(error) else ""
        raise ValueError(f"{name}={value!r}: {problem}expected {self.expected}")


def setting(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Sequence[Any] = (),
    fits: Callable[[Any], bool] | None = None,
    expected: str = "",
    allowed: Allowed | None = None,
    is_path: bool = False,
    added: bool = False,
) -> Any:
    """A field of a section; its kind is that of the default.

    Either a range, or a choice, or what `fits` says, which `expected` puts in words, or what
    `allowed` says. The default may be none of the choice: it then stands for what is still to be
    set. `is_path`: a text that is a path. `added`: there are records of stages without it, made
    when all was as at the default.
    """
    kind = type(default)
    if one_of:
        choice = (default, *one_of)
        allowed = Allowed(kind, lambda value: value in choice, f"one of {tuple(one_of)}")
    elif fits:
        allowed = Allowed(kind, fits, expected)
    elif is_path:
        allowed = Allowed(kind, lambda _: True, _KINDS[kind], is_path=True)
    elif not allowed:
        allowed = _range(kind, at_least, above, at_most, below)
    metadata = {"meaning": meaning, "allowed": allowed, "added": added}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of the dataclasses that hold settings; each is frozen, and valid once it is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if allowed := field.metadata.get("allowed"):
                value = allowed.checked(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
        if problem := self.conflict():
            raise ValueError(problem)

    def conflict(self) -> str:
        """What is wrong with the settings beside each other; "" if nothing is."""
        return ""

    @classmethod
    def kind_of(cls, values: Mapping[str, Any], where: str) -> type[Section]:
        """The class that holds `values`, where there are several kinds of a section."""
        return cls


S = TypeVar("S", bound=Section)


def read(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """The section that holds `values`, and defaults for what they lack.

    Raises:
      ValueError: one line that names the key, at `where`, its value and what was expected.
    """
    own = kind.kind_of(values, where)
    fields = {field.name: field for field in dataclasses.fields(own)}
    given = dict(values)
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{where}.{name}: no such setting{nearest(name, fields)}")
        default = fields[name].default
        if isinstance(default, Section):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}.{name}={value!r}: expected a section of settings")
            given[name] = read(type(default), value, f"{where}.{name}")
    try:
        return own(**given)  # type: ignore[return-value]
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def flat(section: Section, prefix: str = "") -> dict[str, Any]:
    """{"l2s.train.steps": 1000, ...}: the values of a section and of those in it."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        values |= flat(value, f"{name}.") if isinstance(value, Section) else {name: value}
    return values


def recorded(kind: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a section of a kind, as a stage records them among its inputs.

    A setting that was added since there are records, and is at its default, is left out: nothing is
    stale because it has come.
    """
    added = {f.name: f.default for f in dataclasses.fields(kind) if f.metadata.get("added")}
    return {k: v for k, v in values.items() if k not in added or v != added[k]}


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none of `names`: the nearest, or all."""
    if near := difflib.get_close_matches(name, names, n=1):
        return f", did you mean {near[0]!r}?"
    return f"; there are {', '.join(names)}"


def _range(
    kind: type,
    at_least: float | None,
    above: float | None,
    at_most: float | None,
    below: float | None,
) -> Allowed:
    limits = [
        (word, holds, limit)
        for word, holds, limit in (
            (">=", operator.ge, at_least),
            ("above", operator.gt, above),
            ("at most", operator.le, at_most),
            ("below", operator.lt, below),
        )
        if limit is not None
    ]
    name = "a number" if kind is float and limits else _KINDS[kind]
    words = ", ".join(f"{word} {limit}" for word, _, limit in limits)
    most = _MOST_INT if at_most is None and kind is int else None

    def fits(value: Any) -> bool:
        if most is not None and abs(value) > most:
            raise ValueError(_TOO_LARGE)
        return all(holds(value, limit) for _, holds, limit in limits)

    return Allowed(kind, fits, f"{name} {words}".strip())


def _as(kind: type, value: Any) -> Any:
    """The value as one of its kind; a ValueError without words if it is none."""
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_as(tuple, item) if isinstance(item, list | tuple) else item for item in value)
    if kind is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError from None
        if _MOST_FLOAT < abs(value) < math.inf:
            raise ValueError(_TOO_LARGE)
        if math.isfinite(value):
            return value
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        if isinstance(value, int) and abs(value) >= 2**32:
            raise ValueError(_TOO_LARGE)
        return value
    raise ValueError
