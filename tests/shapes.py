"""Checks what the package's signatures say while tests run: a type checker for jaxtyping's hook."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
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
# As in Float[Array, "B T"], whether it is a string still or a type.
_SHAPE = re.compile(r"""\w\[[\w.]+, ['"]""")
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too


def check(packages: list[str]) -> None:
    """Checks what is imported of these packages from now on."""
    # Tests may give a function what lies on the host.
    jaxtyping.Array = jax.Array | np.ndarray
    # The hook calls it by this name.
    jaxtyping.jaxtyped = functools.partial(_where_shapes_are_said, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(packages, "shapes.checked")


def _where_shapes_are_said(jaxtyped: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """jaxtyping's decorator; a function that says no shapes is given beartype's, which is quicker.

    A function within a function is given none: it is made anew at each call, and to decorate it
    takes longer than all else.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, type):
            return jaxtyped(function, **settings)
        if "<locals>" in function.__qualname__:
            return function
        hints = inspect.get_annotations(function).values()
        said = any(_SHAPE.search(str(hint)) for hint in hints)
        if said:
            return jaxtyped(function, **settings)
        check = checked(function)

        @functools.wraps(check)
        def of_its_own(*args: Any, **kwargs: Any) -> Any:
            with jaxtyped("context"):  # sizes are not those of the function that calls this one
                return check(*args, **kwargs)

        return of_its_own

    return decorate


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """As beartype; of a pytree of the package that a function gives, its fields too.

    Axes of one name have one size, in the arguments, the result and the fields of that.
    """
    # The fields of a pytree may be anything when JAX makes one: what it maps arrays to.
    if function.__name__ == "__init__":
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
