"""The parts in which `accumulation` has a batch computed, one after another, to save memory."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict


def rows_of(train: ConfigDict, ways: int) -> int:
    """Rows that are computed at a time: of a part; of all where the mesh, which splits a batch
    `ways`, does not split a part.
    """
    rows = train.batch_size // train.accumulation
    return train.batch_size if rows % ways else rows


def in_parts(batch: PyTree, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...] of each array: part i has every count-th row from i on.

    So each device's rows stay with it.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def whole(parts: PyTree) -> Any:
    """What `in_parts` has made parts of."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
