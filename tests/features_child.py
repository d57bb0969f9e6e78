"""Filling a feature cache as a process of its own, for test_features to kill.

python tests/features_child.py DIRECTORY
"""

import os
import sys
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import small

from l2s_jax.experiment import feature_cache

WIDTH = 24
SHARD = 4
SECONDS = 0.1  # that a shard takes
FACTS = {"llm_hash": "a" * 64, "layer": 0.0}
DATA = small.make_data(small.random_pairs(98, 7), (8, 8))


class Encoder:
    """In the place of an LLM: H is a function of prompt and position, noted in asked.txt."""

    def __init__(self, directory, seconds=0.0):
        self.asked, self.seconds = os.path.join(directory, "asked.txt"), seconds

    def __call__(self, ids, mask):
        ids, mask = np.asarray(ids), np.asarray(mask)
        with open(self.asked, "a", encoding="utf-8") as file:
            file.writelines(f"{row[on].tolist()}\n" for row, on in zip(ids, mask, strict=True))
        time.sleep(self.seconds / SHARD)
        sums = np.cumsum(ids * mask, 1)[..., None]
        hidden = np.sin(sums * np.arange(1, WIDTH + 1)).astype(ml_dtypes.bfloat16)
        # What a model makes of padding may be anything.
        return jnp.asarray(np.where(mask[..., None], hidden, np.asarray(np.nan, hidden.dtype)))


def cache(directory, seconds=0.0, data=DATA, **facts):
    return feature_cache.cached(
        data,
        os.path.join(directory, "features"),
        FACTS | facts,
        lambda: Encoder(directory, seconds),
        mesh=small.mesh_of(),
        split="train",
        width=WIDTH,
        buckets=[4, 8],
        batch_size=1,
    )


def small_shards():
    """Has a shard hold SHARD prompts of average length."""
    feature_cache.SHARD_BYTES = int(SHARD * 2 * WIDTH * DATA.prompt_lengths.mean()) + 1


if __name__ == "__main__":
    small_shards()
    cache(sys.argv[1], SECONDS)
