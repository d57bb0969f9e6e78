"""Names of parameters: '/'-joined paths, the ones that patterns match, layers stacked in one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import jax

# What layers are named that lie in one entry, with an axis of layers in front.
STACKED = "layers"


def path_name(path: tuple) -> str:
    """('a', 'b') of a tree path -> 'a/b'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_stacked(path: str) -> bool:
    """Whether the parameter at a '/'-joined path has an axis of layers in front."""
    return STACKED in path.split("/")


def compiled(pattern: Any, setting: str) -> re.Pattern:
    """A regular expression.

    Raises:
      ValueError: it is none; `setting` is where it is from.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{setting}: {pattern!r} is no pattern, expected a string")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{setting}: {pattern!r} is not a regular expression: {error}") from None


def matching(
    pattern: str, names: Iterable[str], setting: str, *, what: str = "parameter"
) -> set[str]:
    """Those of `names` that `pattern` matches as a whole.

    Raises:
      ValueError: none, or the pattern is no regular expression; `setting` is where it is from.
    """
    names = list(names)
    whole = compiled(pattern, setting)
    found = {name for name in names if whole.fullmatch(name)}
    if not found:
        nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise ValueError(
            f"{setting}: {pattern!r} matches none of {len(names)} {what}s; the nearest: "
            f"{', '.join(nearest)}"
        )
    return found
