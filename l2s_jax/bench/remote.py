"""A contestant in a process of its own, so that nobody's threads or memory are another's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from typing import Any

from l2s_jax.bench.contestants import Case, Contestant, Setup, make


def serve() -> None:
    """A contestant's process: a request per line of stdin, an answer per line of stdout, JSON."""
    # Libraries may print: only answers go where answers are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    contestant: Contestant | None = None
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            if request == "start":
                name, setup = arguments
                contestant = _start(name, Setup(**setup))
                answer({})
            elif request == "prepare":
                facts = contestant.prepare(Case(*arguments))
                _reset_peak()
                contestant.reset_peak()
                answer(facts)
            elif request == "measure":
                answer(contestant.measure())
            elif request == "trace":
                contestant.trace(*arguments)
                answer({})
            elif request == "memory":
                peak = contestant.peak_bytes()
                answer({"peak_bytes": _peak_bytes() if peak is None else peak})
        except Exception as error:  # whatever another library fails with is its result
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def _start(name: str, setup: Setup) -> Contestant:
    # Before the libraries are there, whose threads have the cores that the process has.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup.threads])
    return make(name, setup)


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
    """A contestant in its own process."""

    def __init__(self):
        environment = {
            **os.environ,
            # Threads that spin while they wait would take the next contestant's cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from l2s_jax.bench.remote import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, *request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
          RuntimeError: the contestant failed, or its process ended.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"its process ended ({self._process.wait()})") from None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended ({self._process.wait()})")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
