"""How a run ends when it is asked to: by SIGTERM, by Ctrl-C, or by JAX's notice of a preemption.

At once where nothing is lost by it. Within `deferred`, where a training is, after the step in hand,
so that it can be saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
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
_lock = threading.Lock()
_is_in_job = False
# JAX knows steps by their numbers, which have to ascend from one training to the next.
_questions = itertools.count(1)


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
    global _is_in_job
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    of_jax = _libc.signal(signal.SIGTERM, None)
    tell_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(of_jax)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(writer)
    _is_in_job = True

    def may_wait() -> bool:
        global _noted
        with _lock:
            if _is_deferred:
                _noted = signal.SIGTERM
                tell_jax(_noted)
            return _is_deferred

    def watching() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and not may_wait():
                end(Stopped(signal.SIGTERM))

    threading.Thread(target=watching, daemon=True).start()


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], signal.Signals | None]]:
    """Gives what says, after each step, whether the run is to end there, and by which signal.

    In a job all processes ask equally often, and the answer is the same for all: JAX sees to that.
    There a second signal changes nothing; a process that is alone it ends at once.

    Raises:
      Stopped: at the end, on all processes, by a signal that came too late for an answer.
    """
    global _is_deferred
    with _lock:
        _is_deferred = True
    try:
        yield _agreed if _is_in_job else lambda: _noted
    finally:
        with _lock:
            _is_deferred = False
    if number := _noted_by_any() if _is_in_job else _noted:
        raise Stopped(number)


def _agreed() -> signal.Signals | None:
    # Imported here: what asks for no device doesn't wait for JAX.
    from jax.experimental import multihost_utils

    reached = multihost_utils.reached_preemption_sync_point(next(_questions))
    return signal.SIGTERM if reached else None


def _noted_by_any() -> signal.Signals | None:
    from l2s_jax.cluster import distributed

    return signal.SIGTERM if any(distributed.exchange(_noted is not None)) else None
