"""A small training run, alone or one process of a job, for test_stopping to send signals to.

python tests/stop_child.py DIRECTORY SECONDS_PER_STEP LEARNING_RATE [COORDINATOR PROCESSES PROCESS]
"""

import contextlib
import os
import sys

import jax
import numpy as np
import train_child

from l2s_jax.cluster.job import job
from l2s_jax.cluster.stopping import Stopped, handled

CHANGES = {"evaluate_every": 1000, "log_every": 2}


def main(directory, seconds, rate, coordinator=None, processes=None, process=None):
    place = (coordinator, processes and int(processes), process and int(process))
    joined = contextlib.nullcontext()
    if coordinator:
        joined = job(*place, detect=None, timeout_s=300, heartbeat_s=10)
    with handled(), joined:
        mesh = (jax.device_count(), 1, 1)
        changes = {**CHANGES, "learning_rate": float(rate)}
        weights = train_child.run(directory, float(seconds), mesh=mesh, **changes)
        np.savez(f"{directory}/weights-{process or 0}.npz", *jax.tree.leaves(weights))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Stopped as stopped:
        print(f"error: {stopped}", file=sys.stderr, flush=True)
        os._exit(stopped.status)
