"""What the parts of the GPU kit share: their command line and the file that they leave.

A part is a module that is run as `python -m benchmarks.gpu.NAME --output=FILE.json`. Its file is
complete after every piece that is finished, so that a part that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from l2s_jax.bench.arguments import Parser

Cell = str | float | None


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
        content = {**self.data, "tables": self._tables, "skipped": self._skipped}
        write_json(content, self._path)


def write_json(content: Any, path: str) -> None:
    """Replaces the file as a whole; a number that is not finite becomes null, as JSON has none."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(finite(content), file, indent=2)
        file.write("\n")
    os.replace(f"{path}.tmp", path)


def finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
