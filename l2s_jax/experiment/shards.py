"""Values kept by the content of what they were made from, in shards that appear as a whole.

What is missing is made and added, so a run that was interrupted continues with what it lacks, and
data whose order has changed, or that has grown, finds again what is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


class Store(Protocol):
    """A folder of shards."""

    def files(self) -> list[str]:
        """Paths STEM-NUMBER... of the shards that are there, in order of their numbers."""
        ...

    def missing(self, files: Sequence[str], keys: Any) -> Sequence[int] | np.ndarray:
        """Where `keys` has one that is in none of the shards, each key once, ascending."""
        ...

    def write(self, number: int, keys: Any, values: Sequence[Any]) -> None:
        """Adds the `number`-th shard."""


def fill(
    store: Store,
    keys: Any,
    make: Callable[[list[int], bool], Sequence[Any] | None],
    *,
    size: int,
    together: bool,
    announce: Callable[[Any], None],
) -> list[str]:
    """Adds to `store` what it lacks of `keys`; gives its shards.

    The processes of a job, which share the folder, take turns in writing shards.

    Args:
      store: where shards are.
      keys: of all that is needed, as the store has them.
      make: (places in `keys`, whether this process writes) -> their values, in order; None will do
        where it doesn't write.
      size: values in a shard, but for the last.
      together: whether all processes make every shard; else each makes those that it writes.
      announce: is told, before anything is made, at which places keys are missing, unless none is.
    """
    # Imported here: what is in a store can be seen without.
    import jax

    from l2s_jax.cluster import distributed

    files = distributed.on_primary(store.files)
    missing = store.missing(files, keys)
    if not len(missing):
        return files
    announce(missing)
    numbers = [int(re.findall(r"-(\d{5})", os.path.basename(path))[0]) for path in files]
    next_number = max(numbers, default=-1) + 1
    for turn, start in enumerate(range(0, len(missing), size)):
        places = [*map(int, missing[start : start + size])]
        own = turn % jax.process_count() == jax.process_index()
        if own or together:
            values = make(places, own)
            if own and values is not None:
                store.write(next_number + turn, [keys[i] for i in places], values)
    distributed.barrier("shards")
    return distributed.on_primary(store.files)
