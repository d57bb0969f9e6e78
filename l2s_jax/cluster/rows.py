"""Of what comes of a batch, each process takes rows that its devices have: none are sent.

Where several devices have a row, that of the first copy counts, so that one process takes it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def own(indices: np.ndarray, result: jax.Array) -> np.ndarray:
    """Those of `indices` [B], one for each row of a result [B, ...], that this process takes."""
    return np.concatenate([indices[:0], *(indices[part.index[0]] for part in _parts(result))])


def taken(result: jax.Array) -> list[np.ndarray]:
    """The rows of a result [B, ...] that this process takes, on the host, in the order of `own`."""
    return [row for part in _parts(result) for row in np.asarray(part.data)]


def _parts(result: jax.Array) -> list[Any]:
    """Parts of a result that is split by rows alone, of which this process has the first copy."""
    return [part for part in result.addressable_shards if part.replica_id == 0]
