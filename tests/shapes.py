"""Checks what the package's signatures say while tests run: a type checker for jaxtyping's hook."""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

# Off for code that has models of kinds which the package does not know.
enabled = True
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too


def check(packages: list[str]) -> None:
    """Checks what is imported of these packages from now on."""
    # Tests may give a function what lies on the host.
    jaxtyping.Array = jax.Array | np.ndarray
    jaxtyping.install_import_hook(packages, "shapes.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """As beartype; of a pytree of the package that a function gives, its fields too.

    Axes of one name have one size, in the arguments, the result and the fields of that.
    """
    # The fields of a pytree may be anything when JAX makes one: what it maps arrays to. A function
    # within a function is made anew at each call, which would take longer than all else.
    if function.__name__ == "__init__" or "<locals>" in function.__qualname__:
        return function
    check = _beartype(function)

    @functools.wraps(check)
    def with_fields(*args: Any, **kwargs: Any) -> Any:
        if not enabled:
            return function(*args, **kwargs)
        result = check(*args, **kwargs)
        for part in result if isinstance(result, tuple) else (result,):
            for name, kinds in _arrays(type(part)).items():
                value = getattr(part, name)
                if not isinstance(value, kinds):
                    raise TypeError(f"{type(part).__name__}.{name}: expected {kinds}, got {value}")
        return result

    return with_fields


@functools.cache
def _arrays(kind: type) -> dict[str, tuple[type, ...]]:
    """The fields of a pytree of ours that are arrays or None, and what each may be."""
    if not (kind.__module__.startswith("l2s_jax.") and hasattr(kind, "_flax_dataclass")):
        return {}
    names = vars(sys.modules[kind.__module__])
    fields = {}
    for field in dataclasses.fields(kind):
        hint = eval(str(field.type), names)
        kinds = typing.get_args(hint) or (hint,)
        if all(
            isinstance(one, type) and issubclass(one, jaxtyping.AbstractArray | None)
            for one in kinds
        ):
            fields[field.name] = kinds
    return fields
