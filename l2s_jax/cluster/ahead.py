"""The devices are at the next piece of work while the host takes the last one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def one_ahead(dispatched: Iterable[T]) -> Iterator[T]:
    """All of `dispatched`, each once the one after it is dispatched too."""
    pieces = iter(dispatched)
    try:
        before = next(pieces)
    except StopIteration:
        return
    for piece in pieces:
        yield before
        before = piece
    yield before
