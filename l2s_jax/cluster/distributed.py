"""What one process of a job does for all, and how processes wait for each other.

Every process runs the same program. What is computed with the mesh is computed by all; what is
written, and what decides what to do next, is up to process 0 (`on_primary`). All of them see the
same workdir. How a process joins a job is in job.py.
"""

from __future__ import annotations

import itertools
import json
import reprlib
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# Its client, with barriers and a store of values, has no public name.
from jax._src import distributed as runtime

from l2s_jax.cluster.limits import Limits
from l2s_jax.files import CannotWrite, exit_status

T = TypeVar("T")

_numbers = itertools.count()
_exchanges = itertools.count()
limits = Limits()  # a job may set others
_is_acting = False  # whether this process is at what others wait for


def is_primary() -> bool:
    """Whether this is the process that writes, process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here; needs no device."""
    if client := runtime.global_state.client:
        client.wait_at_barrier(f"l2s_jax/{next(_numbers)} {name}", limits.barrier_s * 1000)


def exchange(value: Any) -> list[Any]:
    """The `value` of every process, in their order; values are JSON-able. Needs no device."""
    state = runtime.global_state
    if not state.client:
        return [value]
    number = next(_exchanges)
    data = zlib.compress(json.dumps(value).encode(), 1)
    state.client.key_value_set_bytes(f"l2s_jax/exchange/{number}/{state.process_id}", data)
    barrier("exchange")
    found = state.client.key_value_dir_get_bytes(f"l2s_jax/exchange/{number}")
    if state.service:  # all have come here, so they have read the one before
        state.client.key_value_delete(f"l2s_jax/exchange/{number - 1}")
    values = {int(key.rpartition("/")[2]): json.loads(zlib.decompress(data)) for key, data in found}
    return [values[process] for process in sorted(values)]


def on_primary(action: Callable[[], T]) -> T:
    """What `action`, which only process 0 runs, gives: JSON-able. The others wait for it.

    Raises:
      ValueError: on all processes, what `action` raised as ValueError or OSError.
      CannotWrite: likewise, where that is no mistake of whoever started the run.
      RuntimeError: `action` calls it too, while the others wait for what `action` gives.
    """
    global _is_acting
    if not runtime.global_state.client:
        return action()
    if _is_acting:
        raise RuntimeError("on_primary within on_primary: the other processes are not there")
    outcome: dict[str, Any] = {}
    if is_primary():
        _is_acting = True
        try:
            outcome["value"] = action()
        except (ValueError, OSError) as error:
            outcome["error"], outcome["status"] = str(error), exit_status(error)
        finally:
            _is_acting = False
    (outcome,) = filter(None, exchange(outcome))
    if "error" in outcome:
        kind = CannotWrite if outcome["status"] == 1 else ValueError
        raise kind(outcome["error"])
    return outcome["value"]


def check_same(values: dict[str, Any]) -> None:
    """Raises a ValueError, on all processes, if `values` (JSON-able) are not the same on all."""
    first, *others = map(_by_path, exchange(values))
    for number, other in enumerate(others, 1):
        for name in first | other:
            ours, theirs = (reprlib.repr(values.get(name)) for values in (first, other))
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name}: {theirs} in process {number}, {ours} in process 0; expected the same "
                    "on all processes"
                )


def _by_path(values: dict[str, Any]) -> dict[str, Any]:
    """What nested dicts hold, by its keys, as in a.b.c."""
    leaves = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(p, simple=True, separator="."): value for p, value in leaves}
