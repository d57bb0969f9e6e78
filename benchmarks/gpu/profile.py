"""The part *profile*: one decoding step at batch 1 and 32, what it launches, and XLA's flags.

    python -m benchmarks.gpu.profile --output=profile.json

The step of T5-small is traced, and then timed with each of the flags that might help
(benchmarks/gpu/flags.py), each time in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import part
from benchmarks.gpu.flags import CANDIDATES
from benchmarks.gpu.runs import copy_rate

USUAL = "XLA's own choices"


def run(output: str, flags: str, limit_s: float, rehearse: bool, trace: bool) -> str:
    """Has benchmarks/gpu/step.py measure in a process with these flags added.

    Returns:
      Why it did not end well; "" where it did.
    """
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-m", "benchmarks.gpu.step", f"--output={output}"]
    command += [] if trace else ["--no-trace"]
    if rehearse:
        command += ["--model=tiny", "--dtype=float32", "--prompt_tokens=8", "--repeats=2"]
        command += ["--batch_sizes=1,2"]
    return part.run_command(command, limit_s, environment)


def tell(result: part.Result, found: Mapping[str, Mapping[str, Any]], copied: float | None) -> None:
    """The tables of what there is so far: by flags, and of the operations."""
    rows = []
    for name, measured in found.items():
        for row in measured["rows"]:
            floor = row["bytes_per_step"] / copied / 1e6 if copied else None
            rows.append(
                [
                    *(name, row["batch_size"], row["ms_per_step"], floor),
                    row["ms_per_step"] / floor if floor else None,
                    row.get("operations_per_step"),
                    row.get("busy_ms_per_step"),
                ]
            )
    usual = found.get(USUAL)
    result.table(
        f"A decoding step of {usual['model'] if usual else 'a model'}",
        (
            *("XLA's flags", "batch", "ms per step", "floor ms", "times the floor"),
            *("operations per step", "busy ms per step"),
        ),
        rows,
        "The floor: weights and cache read once at the rate of a large copy. Operations: kernels "
        "on a GPU; busy: their times added up.",
    )
    for row in usual["rows"] if usual else ():
        result.table(
            f"The ten operations that take longest, batch {row['batch_size']}",
            ("operation", "per step", "µs per step"),
            [[o["name"][:80], o["per_step"], o["us_per_step"]] for o in row["longest"]],
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures as much as there is time for; the exit status."""
    began = time.monotonic()
    options = part.arguments(__doc__.splitlines()[0], argv)
    result = part.Result(options.output)
    folder = options.output.removesuffix(".json")
    os.makedirs(folder, exist_ok=True)
    copied = copy_rate(options.output)
    flags = {USUAL: "", **CANDIDATES}
    if options.rehearse:
        flags = dict(itertools.islice(flags.items(), 2))
    found: dict[str, dict[str, Any]] = {}
    for number, (name, value) in enumerate(flags.items()):
        left = options.limit_s - (time.monotonic() - began)
        if left < 5:
            result.skip(name, "no time was left")
            continue
        output = os.path.join(folder, f"step-{number}.json")
        if reason := run(output, value, left, options.rehearse, trace=name == USUAL):
            result.skip(name, reason)
            continue
        found[name] = part.read_json(output)
        result.data["steps"] = found
        tell(result, found, copied)
    return part.finish(result, [] if USUAL in found else ["the step was not measured"])


if __name__ == "__main__":
    sys.exit(main())
