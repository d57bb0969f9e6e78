"""The server's life: it listens, loads and warms up, answers, and ends when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import uvicorn
import uvloop
from tqdm import tqdm

from l2s_jax.serve.app import make_app
from l2s_jax.serve.heads import BoundedProtocol
from l2s_jax.serve.models import Models, load_models
from l2s_jax.serve.service import Limits, Service
from l2s_jax.serve.signals import NOT_READY, STATUSES, heard

log = logging.getLogger("l2s_jax")

# Seconds that clients have to take what they have been answered, at the end.
_FLUSH_S = 2
# Connections that wait to be accepted.
_BACKLOG = 2048
# Seconds that a connection is kept without a request: longer than load balancers keep theirs (those
# of Google Cloud 600 s), or they would send a request into one that is just being closed.
_IDLE_S = 620


@dataclasses.dataclass(frozen=True)
class Options:
    """What a server is: its models, its limits, prompts that its page offers, where it listens, how
    long it takes to end, a folder for compiled programs or "".
    """

    models: Models
    limits: Limits
    examples: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0
    compilation_cache: str = ""


def start(service: Service, options: Options, on_end: Callable[[str], None]) -> None:
    """Loads the models and warms up, which takes a while: then the service is ready.

    on_end: as of Scheduler.

    Raises:
      ValueError: a model can't be loaded, or a mesh doesn't split the slots.
    """
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    service.start(load_models(options.models), on_end)


def ready_line(options: Options, port: int) -> str:
    """What is said when requests are answered."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{port} serves {', '.join(options.models.names)}"


class _Server(uvicorn.Server):
    """Leaves signals to us: it would end by them, without an answer to those who wait."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(options: Options) -> int:
    """Serves until a signal; the exit status.

    Raises:
      ValueError: it can't listen there, or a model can't be loaded.
    """
    listener = listen(options.host, options.port)
    life = _Life(options, listener)
    status = uvloop.run(life.serve())
    # It is ending: one more signal would only have Python say where it was.
    for number in heard():
        signal.signal(number, signal.SIG_IGN)
    if life.error:
        raise life.error
    if life.loading:
        # What compiles can't be interrupted, and nobody waits for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def listen(host: str, port: int) -> socket.socket:
    """Takes an address; port 0 is a free one.

    Raises:
      ValueError: it can't listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as unless_all_is_well:
        try:
            # Named as TCP, or asyncio leaves Nagle's algorithm on: each answer would wait 40 ms.
            listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            unless_all_is_well.enter_context(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            # Else another one that is starting could take the same address.
            listener.listen(_BACKLOG)
        except (OSError, ValueError) as error:  # a ValueError: what can't be a host's name
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"--host={host} --port={port}: cannot listen there: {reason}"
            ) from None
        listener.set_inheritable(True)
        unless_all_is_well.pop_all()
    return listener


class _Life:
    """One server, from its first to its last moment.

    Attributes:
      error: what was wrong with the models.
      loading: whether it is still being made ready.
    """

    def __init__(self, options: Options, listener: socket.socket):
        self._options, self._listener = options, listener
        self._service = Service(options.limits, options.examples)
        config = uvicorn.Config(
            make_app(self._service),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            backlog=_BACKLOG,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_FLUSH_S,
            timeout_keep_alive=_IDLE_S,
        )
        self._server = _Server(config)
        self._status = 0
        self.error: Exception | None = None
        self.loading = True

    async def serve(self) -> int:
        """Until it ends; the exit status."""
        self._loop = asyncio.get_running_loop()
        for number in heard():
            self._loop.add_signal_handler(number, self._on_signal, number)
        threading.Thread(target=self._load, name="load", daemon=True).start()
        await self._server.serve(sockets=[self._listener])
        return self._status

    def _load(self) -> None:
        """In a thread of its own: loads, warms up, and says that it is ready."""
        try:
            start(self._service, self._options, self._on_end)
        except Exception as error:
            self.error = error
            self._later(self._close)
        self.loading = False
        if self._service.state == "ready":
            print(ready_line(self._options, self._listener.getsockname()[1]), flush=True)

    def _later(self, work: object, *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(work, *arguments)  # type: ignore[arg-type]

    def _on_end(self, reason: str) -> None:
        """In the scheduler's thread, when that ends."""
        if reason:
            self._later(self._lose, reason)

    def _lose(self, reason: str) -> None:
        print(f"error: the device is gone: {' '.join(reason.split())}", file=sys.stderr)
        self._service.state = "stopping"
        self._status = 1
        self._close()

    def _on_signal(self, number: int) -> None:
        self._status = self._status or STATUSES[signal.Signals(number)]
        # A second one waits for nobody.
        again = self._service.state == "stopping"
        self._service.state = "stopping"
        if self.loading:
            if not again:
                tqdm.write(NOT_READY, file=sys.stderr)  # it may stand beside a progress bar
            self._close()
            return
        if not again:
            seconds = self._options.drain_s
            print(f"stopping: what is being answered has {seconds:g} s to end", file=sys.stderr)
        # Those that wait for a next request; the others are when they have been answered.
        for connection in list(self._server.server_state.connections):
            connection.shutdown()
        self._loop.run_in_executor(None, self._drain, 0.0 if again else self._options.drain_s)

    def _drain(self, seconds: float) -> None:
        self._service.stop(seconds)
        self._later(self._close)

    def _close(self) -> None:
        self._server.should_exit = True
