"""Sums over the bits of arrays, by which a checkpoint that is read is known to be what was saved.

They do not depend on how arrays lie on devices: each process adds up what is on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from l2s_jax.cluster import distributed

_BITS = 64


def checksums(tree: Any) -> dict[str, str]:
    """A sum, hex, for the path of each leaf: arrays of JAX or of NumPy, or numbers.

    All processes of a job call it alike. A bit that is turned changes it, and so do rows that have
    changed places.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    parts = distributed.exchange([_own_sum(leaf) for _, leaf in leaves])
    sums = (sum(each) % 2**_BITS for each in zip(*parts, strict=True))
    return {name: f"{total:016x}" for name, total in zip(names, sums, strict=True)}


def different(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Paths of which the sums differ, or that only one of the two has."""
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def _own_sum(leaf: Any) -> int:
    """Of what this process has of an array; of copies on several devices, of the first."""
    if not isinstance(leaf, jax.Array):
        return _sum(np.asarray(leaf), 0)
    own = (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
    return sum(
        _sum(np.asarray(shard.data), (shard.index[0].start or 0) if shard.index else 0)
        for shard in own
    )


def _sum(part: np.ndarray, start: int) -> int:
    """Of an array's rows from `start` on, each times an odd number of its own."""
    if not part.size:
        return 0
    rows = np.ascontiguousarray(part if part.ndim else part[None])
    bits = rows.view(f"u{rows.dtype.itemsize}").reshape(len(rows), -1)
    weights = 2 * np.arange(start, start + len(rows), dtype=np.uint64) + np.uint64(1)
    return int((bits.sum(axis=1, dtype=np.uint64) * weights).sum(dtype=np.uint64))
