"""Filling features and logits as a process of a job, for test_rows: who writes what is noted.

python tests/rows_child.py DIRECTORY COORDINATOR PROCESSES PROCESS
"""

import contextlib
import os
import sys
from unittest import mock

import features_child
import jax
import numpy as np
import small

from l2s_jax.cluster import distributed
from l2s_jax.cluster.job import job
from l2s_jax.cluster.limits import Limits
from l2s_jax.experiment import feature_cache, scoring
from l2s_jax.experiment.record_files import RecordFiles

DATA = features_child.DATA
K, ROWS = 5, 8
BUCKETS = ((4, 4), (8, 8))
# In DIRECTORY/NAME: the sizes of a mesh of two, or of four.
MESHES = {2: {"rows": (2, 1, 1), "copies": (1, 1, 2)}, 4: {"both": (2, 1, 2)}}
# Batches after which processes 0 and 1 are stopped in DIRECTORY/stopped.
STOPPED = (7, 3)


class Counted:
    """What makes batches, until it is stopped."""

    def __init__(self, make, most):
        self.make, self.left = make, most

    def __call__(self, *arguments, **batch):
        if not self.left:
            distributed.barrier("stopped")
            raise ValueError("stopped")
        self.left -= 1
        return self.make(*arguments, **batch)


def features(directory, mesh, data=DATA, most=-1):
    system = small.make_system("add")
    frozen = small.make_params(system)[1]
    return feature_cache.cached(
        data,
        os.path.join(directory, "features"),
        features_child.FACTS,
        lambda: Counted(feature_cache.Encoder(system.llm_config, frozen, mesh), most),
        mesh=mesh,
        split="train",
        width=features_child.WIDTH,
        buckets=[prompt for prompt, _ in BUCKETS],
        batch_size=ROWS,
    )


def logits(directory, mesh, data=DATA):
    system = small.make_system("llm")
    params, _ = small.make_params(system)
    folder = os.path.join(directory, "logits")
    os.makedirs(folder, exist_ok=True)
    return scoring.scored(
        data,
        folder,
        lambda: scoring.Scorer(system, params, mesh, top_k=K, temperature=1.0),
        top_k=K,
        vocabulary=small.VOCABULARY,
        buckets=BUCKETS,
        batch_size=ROWS,
        mesh=mesh,
    )


@contextlib.contextmanager
def noted(directory):
    """Within, each shard is noted: kind, process, number, keys."""
    write = RecordFiles.write

    def writing(store, number, keys, values):
        line = [store._name, jax.process_index(), number, *(key.tobytes().hex() for key in keys)]
        with open(f"{directory}/wrote.txt", "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, line)) + "\n")
        write(store, number, keys, values)

    with mock.patch.object(RecordFiles, "write", writing):
        yield


def main(directory, coordinator, processes, process):
    with job(coordinator, processes, process, limits=Limits(heartbeat_s=10)):
        feature_cache.SHARD_BYTES = scoring.SHARD_BYTES = 1000
        for name, sizes in MESHES[processes].items():
            own = os.path.join(directory, name)
            os.makedirs(own, exist_ok=True)
            mesh = small.mesh_of(*sizes)
            with noted(own):
                kept, teacher = features(own, mesh), logits(own, mesh)
            read = [np.concatenate([teacher[i][1], teacher[i][0]], 1) for i in range(len(DATA))]
            for values in ([kept[i] for i in range(len(DATA))], read):
                distributed.check_same({name: [float(x.astype(float).sum()) for x in values]})
        if processes == 2:
            mesh = small.mesh_of(2, 1, 1)
            features(os.path.join(directory, "stopped"), mesh, most=STOPPED[process])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
