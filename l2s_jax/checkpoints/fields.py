"""Reading of a config.json's fields, with errors that name the file, the field and the value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.messages import shown

# What programs compute with has 32 bits.
_MOST_INT, _MOST_FLOAT = 2**31 - 1, 3.4e38


def read_integer(
    fields: Mapping[str, Any], name: str, default: Any, source: str, low: int = 1
) -> int:
    """An integer of at least `low`, of 32 bits."""
    value = fields.get(name, default)
    if type(value) is not int or not low <= value <= _MOST_INT:
        most = " and of 32 bits at most" if type(value) is int and value > _MOST_INT else ""
        raise ValueError(f"{source}: {name} is {shown(value)}, expected an integer >= {low}{most}")
    return value


def read_fraction(fields: Mapping[str, Any], name: str, default: float, source: str) -> float:
    """A number in [0, 1)."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"{source}: {name} is {shown(value)}, expected a number in [0, 1)")
    return float(value)


def read_positive(fields: Mapping[str, Any], name: str, default: Any, source: str) -> float:
    """A finite number above 0."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= _MOST_FLOAT:
        raise ValueError(f"{source}: {name} is {shown(value)}, expected a finite number above 0")
    return float(value)


def read_flag(fields: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    """true or false."""
    value = fields.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"{source}: {name} is {shown(value)}, expected true or false")
    return value


def read_token(
    fields: Mapping[str, Any], name: str, default: int, vocab_size: int, source: str
) -> int:
    """A token's id below `vocab_size`; the first of a list; `default` where there is none.

    Older files write -1 for none.
    """
    value = fields.get(name)
    if isinstance(value, list) and value:
        value = value[0]
    if value is None or value == -1:
        value = default
    value = read_integer({name: value}, name, None, source, 0)
    if value >= vocab_size:
        raise ValueError(f"{source}: {name} is {value}, not below vocab_size {vocab_size}")
    return value


def read_trained_positions(fields: Mapping[str, Any], source: str) -> int:
    """max_position_embeddings; 0 where there is none."""
    if fields.get("max_position_embeddings") is None:
        return 0
    return read_integer(fields, "max_position_embeddings", None, source)


def refuse_unsupported(
    fields: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]], source: str
) -> None:
    """An error for an option that would change the computation.

    `neutral` gives the values under which it doesn't; a field that isn't there is neutral too.
    """
    for name, values in neutral.items():
        if name in fields and fields[name] not in values:
            raise ValueError(f"{source}: {name} is {shown(fields[name])}, which is not supported")
