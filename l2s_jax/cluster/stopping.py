"""How a run ends when it is asked to: by SIGTERM, by Ctrl-C, or by JAX's notice of a preemption.

At once where nothing is lost by it. Within `deferred`, where a training is, after the step in hand,
so that it can be saved. A validation ends too, and is made by the run that continues.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

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
      word: how it ended, "terminated" or "interrupted".
    """

    def __init__(self, number: signal.Signals, saved: str = ""):
        """`saved`: what is kept of the work in hand."""
        self.word = _WORDS[number]
        super().__init__(
            f"{self.word}{saved}; the same command continues{'' if saved else ' with what is done'}"
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

    The main thread may wait for another process in JAX, where no Python handler is run.
    """
    global _is_in_job
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    of_jax = _libc.signal(signal.SIGTERM, None)
    tell_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(of_jax)
    for heard in _WORDS:
        if signal.getsignal(heard) != signal.SIG_IGN or heard == signal.SIGTERM:
            signal.signal(heard, lambda *_: None)
    signal.set_wakeup_fd(writer)
    _is_in_job = True

    def may_wait(number: int) -> bool:
        global _noted
        with _lock:
            if _is_deferred:
                _noted = _noted or signal.Signals(number)
                tell_jax(signal.SIGTERM)
            return _is_deferred

    def watching() -> None:
        while number := os.read(reader, 1):
            if number[0] in _WORDS and not may_wait(number[0]):
                end(Stopped(signal.Signals(number[0])))

    threading.Thread(target=watching, daemon=True).start()


class Cut(Exception):
    """What is under way ends, because the run is to end."""


class Asked:
    """Whether a run is to end, and by which signal.

    In a job all processes ask equally often, and the answer is the same for all: JAX sees to that.
    """

    def __init__(self, ask: Callable[[], signal.Signals | None]):
        self._ask = ask
        self._signal: signal.Signals | None = None

    def __call__(self) -> signal.Signals | None:
        """Asks; a signal stays the answer."""
        self._signal = self._signal or self._ask()
        return self._signal

    def until(self, things: Iterable[T]) -> Iterator[T]:
        """The things, each once it has been asked.

        Raises:
          Cut: the run is to end.
        """
        for thing in things:
            if self():
                raise Cut
            yield thing


@contextlib.contextmanager
def deferred() -> Iterator[Asked]:
    """Gives what is to be asked, after each step, whether the run is to end there.

    A second signal ends a process that is alone at once. In a job it changes nothing.

    Raises:
      Stopped: at the end, on all processes, by a signal that came too late for an answer.
    """
    global _is_deferred
    with _lock:
        _is_deferred = True
    try:
        yield Asked(_agreed if _is_in_job else lambda: _noted)
    finally:
        with _lock:
            _is_deferred = False
    if number := _noted_by_any() if _is_in_job else _noted:
        raise Stopped(number)


def _agreed() -> signal.Signals | None:
    # Imported here: what asks for no device doesn't wait for JAX.
    from jax.experimental import multihost_utils

    reached = multihost_utils.reached_preemption_sync_point(next(_questions))
    # (A notice of the cloud is a signal to nobody.)
    return (_noted_by_any() or signal.SIGTERM) if reached else None


def _noted_by_any() -> signal.Signals | None:
    from l2s_jax.cluster import distributed

    numbers = distributed.exchange(int(_noted or 0))
    return next((signal.Signals(number) for number in numbers if number), None)
