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
from l2s_jax.cluster.distributed import BARRIER_SECONDS, barrier, check_same, runtime
from l2s_jax.cluster.stopping import Stopped, handle_in_job
from l2s_jax.files import exit_status

jaxlib: Any = importlib.import_module("jaxlib._jax")  # has no types

HEARTBEAT_SECONDS = 40
LOST = 1
CONTINUES = "the same command on all processes continues from the last checkpoint"

_SERVICE_LOST = f"process 0 of the job, or the way to it, was lost; {CONTINUES}"
_FOREVER_MS = 10 * 365 * 24 * 3600 * 1000
_LINGER_SECONDS = 2.0
_LAST_WORDS = "l2s_jax/last words"
# How errors of collectives and of JAX's service begin, whatever their class.
_LOST_PEER = re.compile(
    r"(UNKNOWN: Gloo|INTERNAL: (NCCL|Barrier)|(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED):)"
)
_MISSING = re.compile(r"barrier: (\d+)/(\d+).*task names:\s+([\d\s]+)", re.DOTALL)
_heartbeat_s = HEARTBEAT_SECONDS
_ending, _leaving = threading.Lock(), threading.Event()
# What is given back before a process ends from within.
before_end: list[Callable[[], None]] = []


def described(environment: Mapping[str, str] = os.environ) -> str:
    """Who finds the job of several processes that the environment describes; "" if there is none.

    "jax": JAX by itself, under Slurm, Open MPI 4 and GKE. "mpi4py": JAX through that package, under
    Open MPI 5, MPICH and Intel MPI.
    """

    def several(name: str) -> bool:
        value = environment.get(name, "")
        return value.isdigit() and int(value) > 1

    if several("OMPI_COMM_WORLD_SIZE"):  # Slurm's variables may be those of mpirun itself
        return "jax" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
    if several("SLURM_STEP_NUM_TASKS") or several("MEGASCALE_NUM_SLICES"):
        return "jax"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "jax"
    return "mpi4py" if several("PMI_SIZE") else ""


def _method(
    coordinator: str | None, num_processes: int | None, process_id: int | None, detect: bool | None
) -> str | None:
    """How JAX finds the job: its name of a cluster, "": by itself. None: this process is alone."""
    if coordinator is num_processes is process_id is None:
        found = described()
        if not (found if detect is None else detect):
            return None
        if found == "mpi4py" and not importlib.util.find_spec(found):
            raise ValueError(
                "mpirun started several processes: expected the package mpi4py, from which JAX "
                "knows the job, or --coordinator, --num_processes and --process_id"
            )
        return found.replace("jax", "")
    if coordinator is None or num_processes is None or process_id is None:
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
    return "deactivate" if num_processes > 1 else None


def _make_outspoken(timeout_s: int) -> None:
    """Has `jax.distributed.initialize` raise an error where it would end the process."""
    serve, attend = jaxlib.get_distributed_runtime_service, jaxlib.get_distributed_runtime_client

    def checked(address: str, *arguments: Any, **settings: Any) -> Any:
        # A port in use is a segmentation fault, or shared with the other job.
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        port = int(address.rpartition(":")[2])
        try:
            socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen there: {os.strerror(error.errno or 0)}"
            ) from None
        # By default an hour, after which nobody is left to be told who is missing.
        return serve(address, *arguments, cluster_register_timeout=timeout_s, **settings)

    def raises(status: Any) -> NoReturn:
        # jaxlib (0.10 to 0.12) raises by itself: it has no Python object for the status.
        raise RuntimeError(status)

    jaxlib.get_distributed_runtime_service = checked
    jaxlib.get_distributed_runtime_client = functools.partial(
        attend, missed_heartbeat_callback=raises
    )


def _reason(error: Exception, timeout_s: int) -> str:
    """Why `jax.distributed.initialize` failed, in one line."""
    state, message = runtime.global_state, str(error)
    if state.client:
        try:
            state.client.shutdown()
        except RuntimeError as status:  # that with which the client did not connect
            message += f" {status}"
    me = f"--process_id={state.process_id} of --num_processes={state.num_processes}"
    if found := _MISSING.search(message):
        came, count, names = int(found[1]), int(found[2]), sorted(found[3].split(), key=int)
        # JAX names two at most.
        who = " and ".join(names) if count - came == len(names) else f"{', '.join(names)}, ..."
        message = f"of {count} processes, {who} did not come within {timeout_s} s"
    elif "Unexpected task" in message:
        message = f"{me}: process 0 expects fewer processes"
    elif "incarnation" in message:
        message = f"{me}: another process has the same"
    elif "Deadline Exceeded" in message:
        message = f"process 0 does not answer within {2 * timeout_s} s"
    elif not state.coordinator_address and "defined" in message:
        message = "JAX finds none here; expected --coordinator, --num_processes and --process_id"
    where = f"{state.coordinator_address}: " if state.coordinator_address else ""
    return where + " ".join(message.split())


@contextlib.contextmanager
def job(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool | None,
    timeout_s: int,
    heartbeat_s: int = HEARTBEAT_SECONDS,
    barrier_s: int = BARRIER_SECONDS,
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
      timeout_s: how long process 0 waits for the others; they wait twice as long for it.
      heartbeat_s: how long a process may give no sign of life.
      barrier_s: how long processes wait for one that is late.

    Raises:
      ValueError: the numbers fit no job, or not all processes come together.
    """
    global _heartbeat_s
    _heartbeat_s, distributed.barrier_s = heartbeat_s, barrier_s
    state = runtime.global_state
    method = _method(coordinator, num_processes, process_id, detect)
    if method is None:
        if jax.process_count() > 1:
            raise ValueError(f"one of {jax.process_count()} processes: expected --distributed")
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", True)
    _make_outspoken(timeout_s)
    try:
        jax.distributed.initialize(
            *(coordinator, num_processes, process_id),
            cluster_detection_method=method or None,
            initialization_timeout=2 * timeout_s,
            heartbeat_timeout_seconds=heartbeat_s,
        )
    except Exception as error:
        message = f"cannot join the job: {_reason(error, timeout_s)}"
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
        check_same({"--num_processes": state.num_processes, "jax": jax.__version__}, "")
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
    if late := _MISSING.search(str(error)):
        return f"process {late[3].split()[0]} did not come within {distributed.barrier_s} s", LOST
    if "RPC to coordination service" in message:
        return _SERVICE_LOST, LOST
    if found := re.search(r"Task:? (\d+)", message):
        return f"process {found[1]} of the job was lost; {CONTINUES}", LOST
    # A collective failed. Who watches will know which process it was, and end this one.
    time.sleep(_heartbeat_s + 5)
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
    for action in before_end:
        with contextlib.suppress(Exception):
            action()
    state = runtime.global_state
    if tell and state.client:
        words = json.dumps([f"process {state.process_id}: {message}", status])
        with contextlib.suppress(RuntimeError):  # another process had its last words first
            state.client.key_value_set(_LAST_WORDS, words)
    if state.service:  # with which the others' processes would end, before they have heard
        time.sleep(2 * _LINGER_SECONDS)
    os._exit(status)
