"""Programs without the loops that save memory, for counting operations.

Of a loop's body, compilers count the operations of one turn.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_all_at_once = contextvars.ContextVar("all_at_once", default=False)


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    """Has programs that are traced in it make all scores and all logits at once, however many."""
    token = _all_at_once.set(True)
    try:
        yield
    finally:
        _all_at_once.reset(token)


def is_on() -> bool:
    """Whether this is traced in `all_at_once`."""
    return _all_at_once.get()
