"""Signals that end a server, and its exit status then."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

STATUSES = {signal.SIGTERM: 0, signal.SIGINT: 130}
NOT_READY = "stopped before it was ready"


def heard() -> list[signal.Signals]:
    """Those that end it: a shell has what it runs in the background ignore Ctrl-C."""
    return [number for number in STATUSES if signal.getsignal(number) != signal.SIG_IGN]


def end_at_once() -> None:
    """Has these signals end the process with one line, until somebody else handles them.

    For the time before a server does anything: Python would say where it was.
    """

    def end(number: int, frame: object) -> NoReturn:
        # Not by print, which may have been interrupted by this.
        os.write(sys.stderr.fileno(), f"{NOT_READY}\n".encode())
        os._exit(STATUSES[signal.Signals(number)])

    for number in heard():
        signal.signal(number, end)
