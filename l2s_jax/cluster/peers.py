"""The processes of a job find each other, before JAX does where they are told how, and notice at
once when one ends.

JAX's own service ends a process that cannot join, or whose peer is gone, by an abort with a stack
trace, the latter after its heartbeats have failed for a while. Here process 0 says which processes
are missing or were started differently, and connections that stay open tell who ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

LOST = 1
_HELLO_SECONDS = 10.0
_LINGER_SECONDS = 2.0
CONTINUES = "the same command on all processes continues from the last checkpoint"


class Peers:
    """Connections between process 0 and each of the others, until the job ends."""

    def __init__(
        self,
        coordinator: str,
        num_processes: int,
        process_id: int,
        timeout_s: float,
        server: socket.socket | None = None,
    ):
        """Waits until all processes are there.

        Args:
          coordinator: HOST:PORT of process 0. The port is free again afterwards, for JAX's service.
          num_processes, process_id: of the job, and of this process, 0 to num_processes - 1.
          timeout_s: how long to wait.
          server: listens to that port already, for process 0.

        Raises:
          ValueError: process 0 does not answer, or it cannot listen, misses a process, or hears
            from one that was started as part of another job; on all processes that are there.
        """
        self._coordinator = coordinator
        self._processes, self._me = num_processes, process_id
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._sockets: dict[int, socket.socket] = {}
        self._ending = threading.Lock()
        self._closing = False
        host, _, port = coordinator.rpartition(":")
        if process_id:
            self._attend(host.strip("[]"), int(port))
        else:
            self._receive(server or self._listen(int(port)))
        for connection in self._sockets.values():
            connection.settimeout(None)
            _keep_alive(connection)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def end(self, message: str, status: int, *, tell: bool = True) -> NoReturn:
        """Ends this process, and the others with the same message; waits for nothing else."""
        # Whoever comes second waits for the end of the process.
        self._ending.acquire()
        # The other threads go on until the end: none of their lines is to come after this one.
        sys.stderr.flush()
        stderr = os.dup(sys.stderr.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        os.write(stderr, f"error: {message}\n".encode())
        if tell:
            about = f"process {self._me}: {message}"
            _send(self._sockets.values(), {"error": about, "status": status})
        self._linger()
        sys.stdout.flush()
        os._exit(status)

    def close(self) -> None:
        """Leaves the job, whose work is done."""
        self._closing = True
        _send(self._sockets.values(), {"done": True})

    def _listen(self, port: int) -> socket.socket:
        try:
            return _serve(port)
        except OSError as error:
            raise ValueError(
                f"{self._coordinator}: process 0 cannot listen there: {error.strerror}"
            ) from None

    def _receive(self, server: socket.socket) -> None:
        with server:
            while len(self._sockets) < self._processes - 1:
                server.settimeout(max(self._deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self._processes)) - self._sockets.keys())
                    self._refuse(
                        f"of {self._processes} processes, {_numbers(missing)} did not come within "
                        f"{self._timeout_s:g} s"
                    )
                connection.settimeout(_HELLO_SECONDS)
                try:
                    hello = _read(connection)
                    number, count = int(hello["process"]), int(hello["processes"])
                except (OSError, ValueError, KeyError, TypeError):
                    connection.close()  # no process of a job
                    continue
                problem = ""
                if count != self._processes:
                    problem = f"it was started with --num_processes={count}"
                elif number in self._sockets or not 0 < number < count:
                    problem = "another one has that --process_id"
                if problem:
                    self._sockets[-1] = connection
                    self._refuse(f"process {number} of {self._processes}: {problem}")
                self._sockets[number] = connection
        _send(self._sockets.values(), {"start": True})

    def _refuse(self, reason: str) -> NoReturn:
        message = f"{self._coordinator}: {reason}"
        _send(self._sockets.values(), {"error": message})
        raise ValueError(message)

    def _attend(self, host: str, port: int) -> None:
        where = self._coordinator
        while True:
            remaining = self._deadline - time.monotonic()
            try:
                connection = socket.create_connection((host, port), max(min(remaining, 5.0), 0.1))
                break
            except OSError as error:
                if remaining <= 0:
                    raise ValueError(
                        f"{where}: process 0 does not answer within {self._timeout_s:g} s "
                        f"({error.strerror or error})"
                    ) from None
                time.sleep(0.2)
        _send([connection], {"process": self._me, "processes": self._processes})
        # Process 0 may have been started later than this one.
        connection.settimeout(self._timeout_s + _HELLO_SECONDS)
        try:
            answer = _read(connection)
            if not {"start", "error"} & answer.keys():
                raise ValueError
        except (OSError, ValueError, AttributeError):
            raise ValueError(f"{where}: expected process 0 of this job to answer there") from None
        if "error" in answer:
            raise ValueError(answer["error"])
        self._sockets[0] = connection

    def _watch(self) -> None:
        """Ends this process when another one ends before its work is done."""
        unread = dict.fromkeys(self._sockets, b"")
        selector = selectors.DefaultSelector()
        for number, connection in self._sockets.items():
            selector.register(connection, selectors.EVENT_READ, number)
        while unread:
            for key, _ in selector.select():
                number = key.data
                try:
                    received = self._sockets[number].recv(1 << 16)
                except OSError:
                    received = b""
                *lines, rest = (unread[number] + received).split(b"\n")
                unread[number] = rest
                messages = [json.loads(line) for line in lines]
                if any("done" in message for message in messages) or self._closing:
                    del unread[number]
                    selector.unregister(key.fileobj)
                    continue
                if not received and not messages:
                    ended = f"process {number} of the job ended; {CONTINUES}"
                    messages = [{"error": ended, "status": LOST}]
                for message in messages:
                    others = [s for n, s in self._sockets.items() if n != number]
                    _send(others, message)
                    self.end(message["error"], message["status"], tell=False)

    def _linger(self) -> None:
        """Waits until the others have ended too, for whom JAX's service may end with this one."""
        until = time.monotonic() + _LINGER_SECONDS
        selector = selectors.DefaultSelector()
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map() and (remaining := until - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                with contextlib.suppress(OSError):
                    if key.fileobj.recv(1 << 16):
                        continue
                selector.unregister(key.fileobj)


def offer() -> tuple[socket.socket, str]:
    """What process 0 listens with, and its HOST:PORT: where others reach the host, a free port."""
    server = _serve(0)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: this asks which of the host's addresses leads out of it.
            probe.connect(("192.0.2.1", 9))
            host = probe.getsockname()[0]
    except OSError:
        host = socket.gethostname()
    return server, f"{host}:{server.getsockname()[1]}"


def _serve(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _keep_alive(connection: socket.socket) -> None:
    """Has an idle connection asked after each minute: a host that is gone does not say so, and
    networks forget connections that nothing comes through.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connections: Iterable[socket.socket], message: Any) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> Any:
    """One line of JSON, and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 1 << 16:
            raise ValueError("expected a line of JSON")
        line += byte
    return json.loads(line)


def _numbers(numbers: list[int], limit: int = 8) -> str:
    """[1, 2] -> "1 and 2"."""
    shown = [str(number) for number in numbers[:limit]]
    if len(numbers) > limit:
        shown.append(f"{len(numbers) - limit} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
