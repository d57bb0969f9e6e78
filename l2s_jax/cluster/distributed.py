"""Several processes as one job: how a process joins, and what one of them does for all.

Every process runs the same program. What is computed with the mesh is computed by all; what is
written, and what decides what to do next, is up to process 0 (`on_primary`). All of them see the
same workdir.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from l2s_jax.cluster.peers import CONTINUES, LOST, Peers, offer

log = logging.getLogger(__name__)

T = TypeVar("T")

# Process 0 may train a tokenizer or measure for hours while the others wait.
_WAIT_MS = 7 * 24 * 3600 * 1000
_MEET_SECONDS = 30.0
# How errors of collectives and of JAX's service begin, whatever their class.
_LOST_PEER = re.compile(
    r"(UNKNOWN: Gloo|INTERNAL: NCCL|UNAVAILABLE:|ABORTED:|CANCELLED:|DEADLINE_EXCEEDED:)"
)
_numbers = itertools.count()
_peers: Peers | None = None


def described(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that this process is one of several, by Slurm, Open MPI or GKE.

    In each of these, `jax.distributed.initialize()` finds the job by itself.
    """

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 1

    return (
        count("SLURM_STEP_NUM_TASKS") > 1
        or count("OMPI_COMM_WORLD_SIZE") > 1
        or count("MEGASCALE_NUM_SLICES") > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool | None,
    timeout_s: int,
) -> None:
    """Makes this process part of a job, if it is to be; before JAX is asked for any device.

    Args:
      coordinator, num_processes, process_id: HOST:PORT of process 0, and the job's size and this
        process's number in it; all three, or none.
      detect: without them, whether to take them from the cluster, as
        `jax.distributed.initialize()` does; None: if the environment describes several processes.
      timeout_s: how long to wait for the others.

    Raises:
      ValueError: the numbers fit no job, or not all processes come together.
    """
    global _peers
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given):
        if not all(given):
            raise ValueError(
                "--coordinator, --num_processes and --process_id: expected all three, or none"
            )
        if not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id}, --num_processes={num_processes}: expected a number "
                "from 0 to one less than that of the processes"
            )
        if num_processes == 1:
            return
        try:
            _peers = Peers(coordinator, num_processes, process_id, timeout_s)
        except ValueError as error:
            raise ValueError(f"--coordinator={error}") from None
        settings = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    elif detect or (detect is None and described()):
        settings = {}
    else:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(initialization_timeout=timeout_s, **settings)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot join the job: {error}") from error


@contextlib.contextmanager
def job(*arguments: Any, **settings: Any) -> Iterator[None]:
    """`join`s; what is within is done by all processes, or ended on all with one line each.

    An error does not leave this context where there are several processes: the process ends, with
    the exit status that the command has for the error (1 where another process was lost), because
    the ordinary way out would wait for the others.
    """
    global _peers
    join(*arguments, **settings)
    if jax.process_count() == 1:
        yield
        return
    if not is_primary():
        # The others do the same and would say the same.
        logging.getLogger("l2s_jax").setLevel(logging.ERROR)
    try:
        if not _peers:
            _peers = _meet()
        yield
        barrier("end")
    except BaseException as error:
        _end(*_described(error))
    if _peers:
        _peers.close()
    jax.distributed.shutdown()


def _meet() -> Peers | None:
    """Connects the processes of a job that JAX has found; None if they cannot reach each other."""
    server, where, peers, problem = None, "", None, ""
    try:
        if is_primary():
            server, where = offer()
    except OSError as error:
        problem = str(error)
    if where := exchange(where)[0]:
        try:
            size, number = jax.process_count(), jax.process_index()
            peers = Peers(where, size, number, _MEET_SECONDS, server)
        except (OSError, ValueError) as error:
            problem = str(error)
    if not any(problems := exchange(problem)):
        return peers
    log.warning(
        "processes cannot watch each other (%s): when one ends, the others will do so after JAX's "
        "heartbeats have failed for a while",
        next(filter(None, problems)),
    )
    if peers:
        peers.close()
    return None


def _described(error: BaseException) -> tuple[str, int]:
    """(what to say of an error, exit status)."""
    message = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {CONTINUES}", 130
    if _LOST_PEER.match(message):
        if _peers:
            # Who watches over the peers knows better which one it was, and ends this process.
            time.sleep(5)
        return f"a process of the job, or the way to it, was lost ({message}); {CONTINUES}", LOST
    if isinstance(error, (ValueError, OSError)):
        return message, 2
    traceback.print_exception(error)
    return f"{type(error).__name__}: {message}", 1


def _end(message: str, status: int) -> NoReturn:
    if _peers:
        _peers.end(message, status)
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(status)


def is_primary() -> bool:
    """Whether this is the process that writes, process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here; needs no device."""
    if jax.process_count() > 1:
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"l2s_jax {next(_numbers)} {name}", timeout_ms=_WAIT_MS)


def exchange(value: Any) -> list[Any]:
    """The `value` of every process, by process index; values are JSON-able."""
    if jax.process_count() == 1:
        return [value]
    # A collective may give up where one process is hours late; a barrier doesn't.
    barrier("exchange")
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_primary(action: Callable[[], T]) -> T:
    """What `action`, which only process 0 runs, gives: JSON-able. The others wait for it.

    Raises:
      ValueError: on all processes, what `action` raised as ValueError or OSError.
    """
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    if is_primary():
        try:
            outcome["value"] = action()
        except (ValueError, OSError) as error:
            outcome["error"] = str(error)
    outcome = exchange(outcome)[0]
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def check_same(value: Any, what: str) -> None:
    """Raises a ValueError, on all processes, if `value` (JSON-able) is not the same on all."""
    values = exchange(value)
    if different := [i for i, other in enumerate(values) if other != values[0]]:
        raise ValueError(
            f"{what}: that of process {different[0]} differs from that of process 0; expected the "
            "same on all processes"
        )
