"""All settings in a list, for those who show them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from l2s_jax.settings.declare import Section
from l2s_jax.settings.geometry import MODELS, Model
from l2s_jax.settings.sections import Settings


class Key(NamedTuple):
    """One setting: as in --config.KEY; its type, default, what it may be, and its meaning."""

    key: str
    type: str
    default: Any
    allowed: str
    meaning: str


def describe(section: Section | None = None, prefix: str = "") -> list[Key]:
    """Every setting of a section, by default of a whole config, as they are declared.

    Of a geometry, those of all families; the meaning says which family has what.
    """
    section = Settings() if section is None else section
    keys = []
    for field, of_whom in _fields(section):
        key, default = f"{prefix}{field.name}", field.default
        if isinstance(default, Section):
            keys += describe(default, f"{key}.")
            continue
        if default is dataclasses.MISSING:
            default = field.default_factory()
        allowed = field.metadata["allowed"]
        meaning = f"{field.metadata['meaning']}{of_whom}"
        keys.append(Key(key, str(field.type), default, allowed.expected, meaning))
    return keys


def _fields(section: Section) -> list[tuple[Any, str]]:
    """(field, " (families that have it)") of each; "" where all have it."""
    if not isinstance(section, Model):
        return [(field, "") for field in dataclasses.fields(section)]
    found: dict[str, tuple[Any, list[str]]] = {}
    for family, kind in MODELS.items():
        for field in dataclasses.fields(kind):
            found.setdefault(field.name, (field, []))[1].append(family)
    return [
        (field, "" if len(families) == len(MODELS) else f" ({', '.join(families)})")
        for field, families in found.values()
    ]
