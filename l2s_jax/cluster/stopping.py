"""How a run ends when it is asked to: by SIGTERM, by Ctrl-C, or by JAX's notice of a preemption.

At once where nothing is lost by it. Within `deferred`, where a training is, after the step in hand,
so that it can be saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_WORDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p
# What a signal does that comes while a training goes on: it is noted here.
_noted: signal.Signals | None = None
_is_deferred = False
# JAX's handler of SIGTERM in a job of several processes.
_of_jax: int | None = None


class Stopped(BaseException):
    """A run ends because it was asked to.

    Attributes:
      status: the exit status that tells of it.
    """

    def __init__(self, number: signal.Signals, saved: str = ""):
        """`saved`: what is kept of the work in hand."""
        super().__init__(
            f"{_WORDS[number]}{saved}; the same command continues"
            f"{'' if saved else ' with what is done'}"
        )
        self.status = 128 + number


def _handle(number: int, _: Any) -> None:
    global _noted
    if _is_deferred and _noted is None:
        _noted = signal.Signals(number)
        return
    raise Stopped(signal.Signals(number))


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Has SIGTERM and SIGINT raise `Stopped`, as this module says, in what is within.

    One that is ignored stays so: a shell has what it runs in the background ignore Ctrl-C.
    """
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in _WORDS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in heard}
    try:
        yield
    finally:
        _noted = None
        for number, handler in before.items():
            signal.signal(number, handler)


def handle_in_job(end: Callable[[Stopped], None]) -> None:
    """As `handled`, once this process is one of several: `end` is called, by a thread.

    The main thread may wait for another process in JAX, where no Python handler is run. Ctrl-C is a
    KeyboardInterrupt.
    """
    global _of_jax
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _of_jax = _libc.signal(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(writer)

    def watching() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                end(Stopped(signal.SIGTERM))

    threading.Thread(target=watching, daemon=True).start()


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Gives what says, after each step, whether the run is to end there, and by which signal.

    In a job all processes ask after the same steps, and it is the same step for all: JAX sees to
    that. A second signal ends a process that is alone at once.
    """
    global _is_deferred
    if _of_jax is not None:
        _libc.signal(signal.SIGTERM, _of_jax)
        try:
            yield _agreed
        finally:
            signal.signal(signal.SIGTERM, lambda *_: None)
        return
    _is_deferred = True
    try:
        yield lambda _: _noted
    finally:
        _is_deferred = False
    if _noted is not None:
        raise Stopped(_noted)


def _agreed(step: int) -> signal.Signals | None:
    # Imported here: what asks for no device doesn't wait for JAX.
    from jax._src import distributed as runtime
    from jax.experimental import multihost_utils

    manager = runtime.global_state.preemption_sync_manager
    reached = manager is not None and multihost_utils.reached_preemption_sync_point(step)
    return signal.SIGTERM if reached else None
