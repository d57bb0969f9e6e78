"""One process of a job, for test_distributed: what happens in it is said on stdout.

python tests/peer_child.py COORDINATOR PROCESSES PROCESS ACTION [JOIN_SECONDS [BARRIER_SECONDS]]
"""

import json
import os
import sys
import time

from l2s_jax.cluster import distributed
from l2s_jax.cluster.job import job
from l2s_jax.cluster.limits import Limits


def meet(process):
    """Everything that processes tell each other, without a device."""
    told = distributed.exchange(["from", process]), distributed.on_primary(lambda: {"by": process})
    distributed.check_same({"same": True})
    distributed.barrier("all are here")
    print(json.dumps(told))


def differ(process):
    distributed.check_same({"config": {"steps": 7, "seed": process // 2}})


def refuse(process):
    """Only process 0 finds out what is wrong; the others are at a barrier."""
    distributed.on_primary(lambda: os.listdir("/nonexistent/folder"))


def fail(process):
    """The others compute."""
    if process == 1:
        raise ValueError("no such thing")
    time.sleep(600)


def wait(process):
    """The others wait for process 0."""
    print("waiting", flush=True)
    if process == 0:
        time.sleep(600)
    distributed.barrier("work of process 0")


ACTIONS = {action.__name__: action for action in (meet, differ, refuse, fail, wait)}


def main(coordinator, processes, process, action, join_s="60", barrier_s="600"):
    limits = Limits(join_s=int(join_s), heartbeat_s=6, barrier_s=int(barrier_s))
    try:
        with job(coordinator, int(processes), int(process), limits=limits):
            ACTIONS[action](int(process))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
