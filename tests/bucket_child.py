"""A small training in a bucket as a process of its own, alone or in a job, for tests to kill.

python tests/bucket_child.py DIRECTORY SECONDS_PER_STEP [COORDINATOR PROCESSES PROCESS]
"""

import sys

import train_child

from l2s_jax.cluster.job import job

MESHES = {1: (1, 1, 1), 2: (1, 2, 1)}

if __name__ == "__main__":
    directory, seconds, *of_job = sys.argv[1:]
    coordinator, processes, process = of_job or ("", "1", "0")
    where = (coordinator, int(processes), int(process)) if of_job else (None, None, None)
    with job(*where, detect=False, timeout_s=300):
        train_child.run(directory, float(seconds), mesh=MESHES[int(processes)])
