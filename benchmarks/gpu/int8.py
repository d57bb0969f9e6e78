"""The part *int8*: weights in int8 beside those in bfloat16, on the same cases in the same turns.

python -m benchmarks.gpu.int8 --output=int8.json
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu import part
from benchmarks.gpu.runs import COLUMNS, Run, cells, copy_rate, measure

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
    dtype = "float32" if options.rehearse else "bfloat16"
    folder = options.output.removesuffix(".json")
    copied = copy_rate(options.output)
    table: list[list[Any]] = []
    data: list[dict[str, Any]] = []
    for run, found in measure(runs, result, folder, dtype=dtype, limit_s=options.limit_s):
        table += [cells(run, row, copied) for row in found]
        data += found
        result.data["rows"] = data
        result.table("int8 weights", COLUMNS, table, f"The others hold their weights in {dtype}.")
    return part.finish(result, [] if data else ["nothing was measured"])


if __name__ == "__main__":
    sys.exit(main())
