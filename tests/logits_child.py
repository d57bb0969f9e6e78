"""An LLM reading responses as a process of its own, for test_logits to kill.

python tests/logits_child.py DIRECTORY
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import small

from l2s_jax.experiment import scoring

K = 3
SHARD = 4
SECONDS = 0.1  # that a shard takes
DATA = small.make_data(small.random_pairs(98, 7), (8, 8))


class Score:
    """In the place of an LLM: a function of prompt and response, noted in asked.txt."""

    def __init__(self, directory, seconds=0.0):
        self.asked, self.seconds = os.path.join(directory, "asked.txt"), seconds

    def __call__(self, batch):
        batch = jax.tree.map(np.asarray, batch)
        on = batch["response_mask"]
        real = on.any(1)
        with open(self.asked, "a", encoding="utf-8") as file:
            rows = zip(batch["llm_ids"][real], batch["response_ids"][real], strict=True)
            file.writelines(f"{prompt.tolist()} {response.tolist()}\n" for prompt, response in rows)
        time.sleep(self.seconds / SHARD)
        sums = np.cumsum(batch["response_ids"] * on, 1) + (batch["llm_ids"]).sum(1)[:, None]
        ids = (sums[..., None] + np.arange(K)) % small.VOCABULARY
        shares = 1 + (sums[..., None] + 7 * np.arange(K + 1)) % 11
        log_probs = np.log(shares / shares.sum(-1, keepdims=True)).astype(np.float16)
        # What a model makes of padding may be anything.
        log_probs = np.where(on[..., None], log_probs, np.float16(np.nan))
        return jnp.asarray(ids, jnp.int32), jnp.asarray(log_probs)


def read(directory, seconds=0.0, data=DATA, **changes):
    folder = os.path.join(directory, "logits")
    os.makedirs(folder, exist_ok=True)
    settings = {
        "top_k": K,
        "vocabulary": small.VOCABULARY,
        "buckets": ((4, 4), (8, 8)),
        "batch_size": 1,
        "mesh": small.mesh_of(),
    }
    return scoring.scored(data, folder, lambda: Score(directory, seconds), **(settings | changes))


def small_shards():
    """Has a shard hold SHARD responses of average length."""
    size = scoring.token_bytes(K, small.VOCABULARY)
    scoring.SHARD_BYTES = int(SHARD * size * DATA.response_lengths.mean()) + 1


if __name__ == "__main__":
    small_shards()
    read(sys.argv[1], SECONDS)
