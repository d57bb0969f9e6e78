"""One of the processes of a job that labels and trains, for test_distributed to start and kill.

python tests/job_child.py DIRECTORY SECONDS_PER_STEP COORDINATOR PROCESSES PROCESS
"""

import json
import os
import sys

import jax
import label_child
import numpy as np
import train_child

from l2s_jax import distributed, labels

# Two of four processes hold the same rows of a batch, and parts of the same parameters.
MESHES = {4: (2, 1, 2), 2: (1, 2, 1)}


def main(directory, seconds, coordinator, processes, process):
    with distributed.job(coordinator, processes, process, detect=None, timeout_s=300):
        distributed.on_primary(lambda: os.makedirs(f"{directory}/labels", exist_ok=True))
        labelled = labels.label(
            label_child.EXAMPLES,
            lambda: label_child.Slow(f"{directory}/labels"),
            f"{directory}/labels",
            process_index=process,
            process_count=processes,
        )
        weights = train_child.run(directory, seconds, mesh=MESHES[processes])
        distributed.check_same([example.response for example in labelled], "labels")
        np.savez(f"{directory}/weights-{process}.npz", *jax.tree.leaves(weights))
        with open(f"{directory}/facts-{process}.json", "w", encoding="utf-8") as file:
            json.dump({"devices": jax.device_count(), "own": jax.local_device_count()}, file)


if __name__ == "__main__":
    label_child.SECONDS = 0.0
    labels.SHARD = label_child.SHARD
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
