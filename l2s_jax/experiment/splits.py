"""The examples of a split, which are read when somebody asks for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from l2s_jax.data.table import Example, Indexed


class Split(Indexed[Example]):
    """Examples, and what they are without a look at them.

    Whoever needs only what was made from them, such as their tokens, need not read them.

    Attributes:
      identity: gives what decides each example, JSON-able. The processes of a job call it together.
      is_read: whether they have been read in this process.
    """

    def __init__(
        self, identity: Callable[[], dict[str, Any]], read: Callable[[], Sequence[Example]]
    ):
        self.identity, self._read, self.is_read = identity, read, False

    @functools.cached_property
    def _examples(self) -> Sequence[Example]:
        examples = self._read()
        self.is_read = True
        return examples

    def __len__(self) -> int:
        return len(self._examples)

    def at(self, place: int) -> Example:
        """An example; the first one that is asked for has all read."""
        return self._examples[place]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)
