"""What the parts of the GPU kit share: their command line, what they run and the file they leave.

A part is a module that is run as `python -m benchmarks.gpu.NAME --output=FILE.json`. Its file is
complete after every piece that is finished, so that a part that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.arguments import Parser
from l2s_jax.files import finite, write_json

Cell = str | float | None

GRACE_S = 5.0  # that a command has to end by itself


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of every part: `output`, `rehearse` and `limit_s`.

    Ends the process with status 2 where there is no accelerator and this is no rehearsal.
    """
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="a JSON file")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on any device")
    parser.add_argument("--limit_s", type=float, default=math.inf, help="seconds that it may take")
    options = parser.parse_args(argv)
    # Several processes share the card: none is to take all of its memory at the start.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not options.rehearse:
        import jax  # here, so that a wrong option need not wait for it

        if jax.default_backend() == "cpu":
            parser.error("JAX sees no accelerator here; --rehearse runs on a CPU")
    return options


class Result:
    """The file of a part: tables for people, `data` for programs, and what was skipped and why."""

    def __init__(self, path: str):
        self.data: dict[str, Any] = {}
        self._path = path
        self._tables: list[dict[str, Any]] = []
        self._skipped: dict[str, str] = {}

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = ""
    ) -> None:
        """Adds a table, in place of one with the same title, and writes the file."""
        made = {
            "title": title,
            "columns": list(columns),
            "rows": [list(row) for row in rows],
            "note": note,
        }
        titles = [table["title"] for table in self._tables]
        if title in titles:
            self._tables[titles.index(title)] = made
        else:
            self._tables.append(made)
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """Says what was not done, and writes the file."""
        self._skipped[name] = reason
        self.write()

    def write(self) -> None:
        """Replaces the file as a whole."""
        os.makedirs(os.path.dirname(os.path.abspath(self._path)), exist_ok=True)
        content = {**self.data, "tables": self._tables, "skipped": self._skipped}
        write_json(self._path, finite(content))


def read_json(path: str) -> Any:
    """What a file holds; None where it isn't there, or not whole."""
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        return json.load(file)
    return None


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not there; none is imported, but for what holds it."""
    return [name for name in packages if not _is_there(name)]


def _is_there(name: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of what would hold it
        return importlib.util.find_spec(name) is not None
    return False


def last_error(output: str) -> str:
    """The line that says why a command failed: its last error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")


def run_command(
    command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None
) -> str:
    """Why a command did not end well within so many seconds; "" where it did.

    It is asked to end at the limit, and killed where it doesn't. Its errors go to this process's.
    """
    print("+", *command, flush=True)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        _, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            sys.stderr.write(process.communicate(timeout=GRACE_S)[1])
        process.kill()
        return f"stopped after {limit_s:.0f} s"
    sys.stderr.write(errors)
    return last_error(errors) if process.returncode else ""


def too_large(problem: str) -> bool:
    """Whether a library's message says that the card has too little memory."""
    return "RESOURCE_EXHAUSTED" in problem or "out of memory" in problem.lower()


def finish(result: Result, failures: Sequence[str]) -> int:
    """The exit status: 1 with a line that names all failures, where there are any."""
    result.write()
    if not failures:
        return 0
    print(f"error: {'; '.join(failures)}", file=sys.stderr)
    return 1
