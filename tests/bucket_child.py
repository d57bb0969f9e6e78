"""A small training in a bucket, one process of a job of two, for tests to kill.

python tests/bucket_child.py DIRECTORY SECONDS_PER_STEP COORDINATOR PROCESS
"""

import sys

import train_child

from l2s_jax.cluster.job import job

if __name__ == "__main__":
    directory, seconds, coordinator, process = sys.argv[1:]
    with job(coordinator, 2, int(process)):
        train_child.run(directory, float(seconds), mesh=(1, 2, 1))
