"""A small training run as a process of its own, for test_train to kill.

python tests/train_child.py DIRECTORY SECONDS_PER_STEP
"""

import sys
import time

import numpy as np
import small

from l2s_jax.cluster.sharding import batch_rows, batch_ways
from l2s_jax.training import loop
from l2s_jax.training.parts import rows_of

STEPS = 24


class Slow:
    """A batch iterator that takes its time, so that a kill finds the run anywhere in it."""

    def __init__(self, batches, seconds):
        self.batches, self.seconds = batches, seconds

    def __next__(self):
        time.sleep(self.seconds)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def run(
    directory,
    seconds=0.0,
    wrap=lambda batches: batches,
    mesh=(1, 1, 1),
    name="add",
    validate=lambda batch: [batch],
    **changes,
):
    """Trains a system with everything that a checkpoint has to bring back; gives its parameters."""
    mesh = small.mesh_of(*mesh)
    system = small.make_system(name, dropout_rate=0.1)
    params, frozen = small.make_params(system)
    config = small.make_train_config(
        STEPS, evaluate_every=3, ema_decay=0.9, learning_rate=1e-2, accumulation=2, warmup_steps=5
    )
    config.update(dropout_rate=0.1, schedule="cosine", select="last")
    config.update(**changes)
    rows, at_a_time = batch_rows(mesh, 8), rows_of(config, batch_ways(mesh))
    scored = batch_rows(mesh, at_a_time)
    held_out = small.make_batch(system, rows=at_a_time)
    validation = {key: value[scored] for key, value in held_out.items()}
    return loop.fit(
        system,
        frozen,
        params,
        config,
        batches=wrap(
            Slow(
                small.make_batches(system, small.random_pairs(30, 7), batch_size=8, rows=rows),
                seconds,
            )
        ),
        validation=validate(validation),
        directory=directory,
        fingerprint="f",
        seed=0,
        mesh=mesh,
    )


if __name__ == "__main__":
    weights = run(sys.argv[1], float(sys.argv[2]))
    flat = {str(i): leaf for i, leaf in enumerate(small.jax.tree.leaves(weights))}
    np.savez(f"{sys.argv[1]}/weights.npz", **flat)
