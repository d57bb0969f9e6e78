"""A contestant in a process of its own, so that nobody's threads or memory are another's."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, cast

from l2s_jax.bench.contestants import CONTESTANTS, Case, Contestant, Setup, make

if TYPE_CHECKING:
    from l2s_jax.bench.bandwidth import Bandwidth

BANDWIDTH = "bandwidth"  # in the place of a contestant's name
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PACKAGE = pathlib.Path(__file__).resolve().parent.parent.parent


def serve() -> None:
    """A contestant's process: a request per line of stdin, an answer per line of stdout, JSON."""
    end_with_parent()
    # Libraries may print: only answers go where answers are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    contestant: Any = None
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            if request == "start":
                contestant, facts = _start(*arguments)
                answer(facts)
            elif request == "prepare":
                facts = contestant.prepare(Case(*arguments))
                _reset_peak()
                contestant.reset_peak()
                answer(facts)
            elif request == "measure":
                answer(contestant.measure(*arguments))
            elif request == "trace":
                contestant.trace(*arguments)
                answer({})
            elif request == "memory":
                peak = contestant.peak_bytes()
                answer({"peak_bytes": _peak_bytes() if peak is None else peak})
        except Exception as error:  # whatever another library fails with is its result
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def end_with_parent() -> None:
    """Has this process killed where its parent is, which could not end it while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(
    name: str, shared: dict[str, Any], arguments: dict[str, Any]
) -> tuple[Contestant | Bandwidth, dict[str, Any]]:
    """(who is measured, what there is to say of it)."""
    setup = Setup(**shared)
    # Before the libraries are there, whose threads have the cores that the process has.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.threads])
    if name == BANDWIDTH:
        from l2s_jax.bench.bandwidth import Bandwidth

        bandwidth = Bandwidth()
        return bandwidth, bandwidth.facts()
    from importlib import metadata

    contestant = make(name, setup, arguments)
    return contestant, {"version": metadata.version(CONTESTANTS[name].library)}


def _reset_peak() -> None:
    """What `_peak_bytes` gives starts anew from what is held now, where the system lets it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak_bytes() -> float:
    """The most memory that this process has held; NaN where the system doesn't tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return math.nan


class Remote:
    """A contestant in its own process, which is stopped while nothing is asked of it.

    Its threads may spin while they wait for more to do, and would take another's cores.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, python: str = sys.executable):
        """`python` has the contestant's library; it need not have this package."""
        paths = [str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            **os.environ,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONPATH": os.pathsep.join(paths),
            **(environment or {}),
        }
        self._process = subprocess.Popen(
            [python, "-c", "from l2s_jax.bench.remote import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)

    def ask(self, *request: Any) -> Any:
        """The answer to a request.

        Raises:
          RuntimeError: the contestant failed, or its process ended.
        """
        self._signal("SIGCONT")
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            raise RuntimeError(f"its process ended ({self._process.wait()})") from None
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"its process ended ({self._process.wait()})")
        self._signal("SIGSTOP")
        found = json.loads(line)
        if isinstance(found, dict) and "error" in found:
            raise RuntimeError(found["error"])
        return found

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # else it goes on, and the others wait beside it
            self._process.send_signal(getattr(signal, name))

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self._signal("SIGCONT")
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._answers.close()
