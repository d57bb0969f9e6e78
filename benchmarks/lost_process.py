"""One of four processes of a job is killed: seconds until the others end, and their last lines.

    python benchmarks/lost_process.py [--heartbeat_timeout=40]

The four are on this machine. Situations: all compute together, in collectives; each computes by
itself; all wait for process 0, which works alone. Process 2 is killed in each, then process 0,
in whom JAX's service lives.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from l2s_jax.arguments import Parser

PROCESSES = 4
SITUATIONS = ("together", "by itself", "waiting")
VICTIMS = (2, 0)


def work(situation: str, coordinator: str, process: int, heartbeat_s: int) -> None:
    """What one process does, until it is ended."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from l2s_jax.cluster import distributed
    from l2s_jax.cluster.job import job
    from l2s_jax.cluster.limits import Limits

    with job(coordinator, PROCESSES, process, limits=Limits(heartbeat_s=heartbeat_s)):
        multihost_utils.process_allgather(np.ones(1))
        print("working", flush=True)
        if situation == "waiting" and process:
            distributed.barrier("the work of process 0")
        while True:
            if situation == "together":
                multihost_utils.process_allgather(np.ones(1))
            else:
                jax.block_until_ready(jax.numpy.ones(8) + 1)
            time.sleep(0.01)


def lose(situation: str, victim: int, heartbeat_s: int) -> None:
    """Prints one row per process that is left."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, __file__, situation, where]
    processes = [
        subprocess.Popen(
            [*command, str(process), str(heartbeat_s)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    for process in processes:
        while process.stdout.readline() != "working\n":  # Gloo has lines of its own
            if process.poll() is not None:
                sys.exit(process.stderr.read())
    time.sleep(heartbeat_s)  # whenever it happens
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()

    def end(process: subprocess.Popen) -> tuple[float, int, str]:
        errors = process.communicate()[1].strip().splitlines()
        return time.monotonic() - killed, process.returncode, (errors or [""])[-1]

    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(end, processes))
    for number, (seconds, status, line) in enumerate(ends):
        if number != victim:
            print(f"| {situation} | {victim} | {number} | {seconds:.1f} | {status} | {line} |")


def main() -> None:
    """All situations and victims."""
    parser = Parser()
    parser.add_argument("--heartbeat_timeout", type=int, default=40)
    flags = parser.parse_args()
    print("| the processes work | killed | process | seconds | exit status | last line |")
    print("|---|---|---|---|---|---|")
    for situation in SITUATIONS:
        for victim in VICTIMS:
            lose(situation, victim, flags.heartbeat_timeout)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
