"""A contestant in a process of its own, so that nobody's threads or memory are another's."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from l2s_jax.bench.contestants import CONTESTANTS, Case, Contestant, Setup


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
                contestant = CONTESTANTS[name][2](Setup(**setup))
                answer({})
            elif request == "prepare":
                answer(contestant.prepare(Case(*arguments)))
            elif request == "measure":
                answer(contestant.measure())
            elif request == "trace":
                contestant.trace(*arguments)
                answer({})
            elif request == "memory":
                answer({"peak_bytes": _peak_bytes()})
        except Exception as error:  # whatever another library fails with is its result
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def _peak_bytes() -> int:
    """Most memory that this process has held: of the accelerator where JAX has one, else of all."""
    jax = sys.modules.get("jax")
    if jax is not None and (device := jax.local_devices()[0].memory_stats()):
        return device["peak_bytes_in_use"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Remote:
    """A contestant in its own process."""

    def __init__(self, name: str):
        self._name = name
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

    def start(self, setup: Setup) -> None:
        """Makes the contestant; errors as of `ask`."""
        self.ask("start", self._name, dataclasses.asdict(setup))

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
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
