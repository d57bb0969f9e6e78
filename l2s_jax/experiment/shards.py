"""Values kept by the content of what they were made from, in shards that appear as a whole.

What is missing is made and added, so a run that was interrupted continues with what it lacks, and
data whose order has changed, or that has grown, finds again what is there. All that is missing is
made in one stream. A shard has whole batches of it, or one process's rows of whole batches, so that
a run that continues makes the same, as far as all processes have written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
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


# Which batches, or values, of all a process makes: (i, n), every n-th one from the i-th on.
Part = tuple[int, int]
# A batch, or a process's rows of it: its places, and what gives their values, in order.
Made = tuple[Sequence[int], Callable[[], Sequence[Any]]]


def fill(
    store: Store,
    keys: Any,
    make: Callable[[list[int], Part], Iterator[Made]],
    *,
    size: int,
    together: bool,
    announce: Callable[[Any], None],
) -> list[str]:
    """Adds to `store` what it lacks of `keys`; gives its shards.

    The processes of a job share the folder.

    Args:
      store: where shards are.
      keys: of all that is needed, as the store has them.
      make: gives the batches of a part of the places in `keys`. Their values are asked for where
        this process writes them.
      size: values that a shard has at least, but for the last.
      together: whether all processes give every value, and take turns in writing shards; else each
        gives those that it writes, into shards of its own.
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
    processes, me = jax.process_count(), jax.process_index()
    part = (0, 1) if together else (me, processes)
    turn, places, values = part[0], list[int](), list[Any]()

    def write() -> None:
        if values:
            store.write(next_number + turn, [keys[i] for i in places], values)

    for made, read in make([*map(int, missing)], part):
        places += made
        if turn % processes == me:
            values += read()
        if len(places) >= size:
            write()
            turn, places, values = turn + part[1], [], []
    write()
    distributed.barrier("shards")
    return distributed.on_primary(store.files)
