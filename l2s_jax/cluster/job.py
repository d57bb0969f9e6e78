"""How a process joins a job of several, and how all of them end when one does.

Joining, barriers, heartbeats and the store of values are `jax.distributed`'s, whose service is in
process 0 and trusts whoever speaks its protocol. Left alone, it aborts a process that cannot join
or has lost another one. Here that is one line, which names the other, and an exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from l2s_jax.cluster import distributed
from l2s_jax.cluster.distributed import barrier, check_same, runtime
from l2s_jax.cluster.limits import Limits
from l2s_jax.cluster.stopping import Stopped, handle_in_job
from l2s_jax.files import exit_status

jaxlib: Any = importlib.import_module("jaxlib._jax")  # has no types

LOST = 1
CONTINUES = "the same command on all processes continues from the last checkpoint"

_SERVICE_LOST = f"process 0 of the job, or the way to it, was lost; {CONTINUES}"
_FOREVER_MS = 10 * 365 * 24 * 3600 * 1000
_LINGER_SECONDS = 2.0
_LAST_WORDS = "l2s_jax/last words"
_PLACE = "--coordinator, --num_processes and --process_id"
_SEVERAL = r"[2-9]|[1-9]\d+"
# Who finds a job of several processes, and the variables of the environment that describe it.
_FINDERS = (
    # (Before Slurm's, which may be those of mpirun itself.)
    ("jax", {"OMPI_COMM_WORLD_SIZE": _SEVERAL, "OMPI_MCA_orte_hnp_uri": ".+"}),
    ("mpi4py", {"OMPI_COMM_WORLD_SIZE": _SEVERAL}),
    ("jax", {"SLURM_STEP_NUM_TASKS": _SEVERAL}),
    ("jax", {"MEGASCALE_NUM_SLICES": _SEVERAL}),
    ("jax", {"TPU_WORKER_HOSTNAMES": ".*,.*"}),
    ("mpi4py", {"PMI_SIZE": _SEVERAL}),
)
# How many came to a barrier, of how many; who did not, of whom JAX names two at most.
_MISSING = r"barrier: (\d+)/(\d+).*task names: (\d+)(?: (\d+))?"
# What messages of JAX's have when a process cannot join, and the words for it.
_NO_JOB = (
    (r"Errno \d+\] (.+) \(while attempting to bind", "process 0 cannot listen there: {1}"),
    (_MISSING, "of {2} processes, {who} did not come within {join_s} s"),
    ("Unexpected task", "{me}: process 0 expects fewer processes"),
    ("incarnation", "{me}: another process has the same"),
    ("Deadline Exceeded", "process 0 does not answer within {patience_s} s"),
    ("coordinator_address should", f"JAX finds none here; expected {_PLACE}"),
)
# How errors of collectives and of JAX's service begin, whatever their class.
_LOST_PEER = re.compile(
    r"(UNKNOWN: Gloo|INTERNAL: (NCCL|Barrier)|(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED):)"
)
# What these say of who was lost.
_LOST = (
    (_MISSING, "process {3} did not come within {barrier_s} s"),
    ("RPC to coordination service", _SERVICE_LOST),
    (r"Task:? (\d+)", f"process {{1}} of the job was lost; {CONTINUES}"),
)
_ending, _leaving = threading.Lock(), threading.Event()
# What is given back before a process ends from within.
before_end = contextlib.ExitStack()


def described(environment: Mapping[str, str] = os.environ) -> str:
    """Who finds the job of several processes that the environment describes; "" if there is none.

    "jax": JAX by itself, under Slurm, Open MPI 4 and GKE. "mpi4py": JAX through that package, under
    Open MPI 5, MPICH and Intel MPI.
    """
    for finder, variables in _FINDERS:
        if all(re.fullmatch(wanted, environment.get(n, "")) for n, wanted in variables.items()):
            return finder
    return ""


def _method(coordinator: str | None, count: int | None, detect: bool | None) -> str | None:
    """How JAX finds the job: its name of a cluster, "": by itself. None: this process is alone."""
    if coordinator:
        return "deactivate" if count != 1 else None
    found = described()
    if not (found if detect is None else detect):
        return None
    if found == "mpi4py" and not importlib.util.find_spec(found):
        raise ValueError(
            "mpirun started several processes: expected the package mpi4py, from which JAX "
            f"knows the job, or {_PLACE}"
        )
    return found.replace("jax", "")


def _make_outspoken(join_s: int) -> None:
    """Has `jax.distributed.initialize` raise an error where it would end the process."""
    serve, attend = jaxlib.get_distributed_runtime_service, jaxlib.get_distributed_runtime_client

    def checked(address: str, *arguments: Any, **settings: Any) -> Any:
        # A port in use is a segmentation fault, or shared with the other job.
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        port = int(address.rpartition(":")[2])
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
        # By default an hour, after which nobody is left to be told who is missing.
        return serve(address, *arguments, cluster_register_timeout=join_s, **settings)

    def raises(status: Any) -> NoReturn:
        # jaxlib (0.10 to 0.12) raises by itself: it has no Python object for the status.
        raise RuntimeError(status)

    jaxlib.get_distributed_runtime_service = checked
    jaxlib.get_distributed_runtime_client = functools.partial(
        attend, missed_heartbeat_callback=raises
    )


def _words(rows: tuple[tuple[str, str], ...], message: str, **known: Any) -> str:
    """Those of the first row whose pattern the message has; "" if there is none."""
    for pattern, words in rows:
        if found := re.search(pattern, message):
            return words.format(found[0], *found.groups(), **known)
    return ""


def _reason(error: Exception, join_s: int) -> str:
    """Why `jax.distributed.initialize` failed, in one line."""
    state, message = runtime.global_state, str(error)
    if state.client:
        try:
            state.client.shutdown()
        except RuntimeError as status:  # that with which the client did not connect
            message += f" {status}"
    message, who = " ".join(message.split()), ""
    if found := re.search(_MISSING, message):
        names = sorted(filter(None, found.groups()[2:]), key=int)
        is_all = int(found[2]) - int(found[1]) == len(names)
        who = " and ".join(names) if is_all else ", ".join([*names, "..."])
    me = f"--process_id={state.process_id} of --num_processes={state.num_processes}"
    known = {"me": me, "who": who, "join_s": join_s, "patience_s": 2 * join_s}
    where = f"{state.coordinator_address}: " if state.coordinator_address else ""
    return where + (_words(_NO_JOB, message, **known) or message)


@contextlib.contextmanager
def job(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool | None = None,
    limits: Limits = Limits(),
) -> Iterator[None]:
    """What is within is done by all processes of a job, or ended on all with one line each.

    Before JAX is asked for any device. An error does not leave this context where there are several
    processes: the process ends, with the exit status that the command has for the error (1 where
    another process was lost), because the ordinary way out would wait for the others.

    Args:
      coordinator, num_processes, process_id: HOST:PORT of process 0, and the job's size and this
        process's number in it; all three, or none.
      detect: without them, whether to take them from the cluster, as
        `jax.distributed.initialize()` does; None: if the environment describes several processes.
      limits: how long the processes wait for each other.

    Raises:
      ValueError: there is no such job, or not all processes come together.
    """
    distributed.limits = limits
    state = runtime.global_state
    method = _method(coordinator, num_processes, detect)
    if method is None:
        if jax.process_count() > 1:
            raise ValueError(f"one of {jax.process_count()} processes: expected --distributed")
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", True)
    _make_outspoken(limits.join_s)
    try:
        jax.distributed.initialize(
            *(coordinator, num_processes, process_id),
            cluster_detection_method=method or None,
            initialization_timeout=2 * limits.join_s,
            heartbeat_timeout_seconds=limits.heartbeat_s,
        )
    except Exception as error:
        message = f"cannot join the job: {_reason(error, limits.join_s)}"
        if state.client:
            end(message, 2)
        raise ValueError(message) from error
    client: Any = state.client
    handle_in_job(lambda stopped: end(*_described(stopped), tell=True))
    if state.process_id:
        # The others do the same and would say the same.
        logging.getLogger("l2s_jax").setLevel(logging.ERROR)
    abort = ctypes.CDLL(None).signal
    abort.argtypes = (ctypes.c_int, ctypes.c_void_p)
    abort(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))
    # Each waits at one of two barriers from now on, and comes to the other when its work is done.
    gates = ["l2s_jax/gate 0", "l2s_jax/gate 1"]
    own = gates.pop(min(state.process_id, 1))
    _watch(lambda: client.wait_at_barrier(own, _FOREVER_MS))
    _watch(lambda: client.blocking_key_value_get(_LAST_WORDS, _FOREVER_MS))
    try:
        check_same({"--num_processes": state.num_processes, "jax": jax.__version__})
        yield
        barrier("end")
        client.wait_at_barrier(gates[0], _FOREVER_MS)
        _leaving.set()
        jax.distributed.shutdown()
    except BaseException as error:
        end(*_described(error), tell=True)
    abort(signal.SIGABRT, None)


def _watch(wait: Callable[[], str | None]) -> None:
    """Ends this process by what `wait`, in a thread, gives or raises before the work is done."""

    def watching() -> None:
        try:
            words = wait()
        except RuntimeError as error:
            if not _leaving.is_set():
                end(*_described(error))
        else:
            if words:
                end(*json.loads(words))

    # Python waits for it: a thread that comes back from JAX while Python ends aborts the process.
    threading.Thread(target=watching).start()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """What SIGABRT does in a job: JAX's client aborts the process from a thread of its own."""
    time.sleep(_LINGER_SECONDS)  # who watches may know which process it was
    end(_SERVICE_LOST, LOST)


def _described(error: BaseException) -> tuple[str, int]:
    """(what to say of an error, exit status)."""
    message = " ".join(str(error).split())
    if isinstance(error, Stopped):
        return message, error.status
    if not _LOST_PEER.match(message):
        if isinstance(error, ValueError | OSError | FloatingPointError):
            return message, exit_status(error)
        traceback.print_exception(error)
        return f"{type(error).__name__}: {message}", 1
    limits = distributed.limits
    if words := _words(_LOST, message, barrier_s=limits.barrier_s):
        return words, LOST
    # A collective failed. Who watches will know which process it was, and end this one.
    time.sleep(limits.heartbeat_s + 5)
    return f"a process of the job, or the way to it, was lost ({message}); {CONTINUES}", LOST


def end(message: str, status: int, *, tell: bool = False) -> NoReturn:
    """Ends this process; `tell`: and the others, with the same message and status."""
    # Whoever comes second waits for the end of the process.
    _ending.acquire()
    # The other threads go on until the end: none of their lines is to come after this one.
    sys.stderr.flush()
    stderr = os.dup(sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    os.write(stderr, f"error: {message}\n".encode())
    sys.stdout.flush()
    # Whatever hangs, the process ends then.
    threading.Timer(_LINGER_SECONDS, os._exit, (status,)).start()
    with contextlib.suppress(Exception):
        before_end.close()
    state = runtime.global_state
    if tell and state.client:
        words = json.dumps([f"process {state.process_id}: {message}", status])
        with contextlib.suppress(RuntimeError):  # another process had its last words first
            state.client.key_value_set(_LAST_WORDS, words)
    if state.service:  # with which the others' processes would end, before they have heard
        time.sleep(2 * _LINGER_SECONDS)
    os._exit(status)
