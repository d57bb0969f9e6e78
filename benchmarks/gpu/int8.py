"""The part *int8*: weights in int8 beside those in bfloat16, on the same cases in the same turns.

python -m benchmarks.gpu.int8 --output=int8.json
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu import part
from benchmarks.gpu.runs import COLUMNS, Run, cells, copy_rate, dtype_of, measure

RUNS = (
    Run("t5-large", "t5-small", (1, 32), (64,), ("slm", "slm-int8")),
    Run("flan-t5-xl", "t5-base", (32,), (128,), ("l2s", "l2s-int8"), prompt_tokens=440, repeats=3),
    Run("t5-large", "t5-small", (1,), (64,), ("llm", "llm-int8")),
    Run("flan-t5-xl", "t5-base", (32,), (128,), ("llm", "llm-int8"), prompt_tokens=440, repeats=3),
)


def main() -> int:
    """Measures as much as there is time for; the exit status."""
    options = part.arguments(__doc__.splitlines()[0])
    result = part.Result(options.output)
    runs = [RUNS[0].tiny()] if options.rehearse else RUNS
    copied = copy_rate(options.output)
    rows: list[tuple[Run, dict[str, Any]]] = []
    for rows in measure(options, runs, result):
        result.data["rows"] = [row for _, row in rows]
        result.table(
            "int8 weights",
            COLUMNS,
            [cells(run, row, copied) for run, row in rows],
            f"The others hold their weights in {dtype_of(options)}.",
        )
    return part.finish(result, [] if rows else ["nothing was measured"])


if __name__ == "__main__":
    sys.exit(main())
