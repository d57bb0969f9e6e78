"""The part *exact*: the LLM's own text, drafted for by L2S, beside the LLM alone and L2S alone.

    python -m benchmarks.gpu.exact --output=exact.json

Weights are random, and random models don't agree: which drafts pass is drawn by chance, each with
the same probability. A draft that passes needs all drafts before it to have passed, as always.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import part
from benchmarks.gpu.runs import COLUMNS, Run, cells, copy_rate, dtype_of, measure
from l2s_jax.bench.contestants import CONTESTANTS

OURS = ("llm", "exact", "l2s")
XL = Run("flan-t5-xl", "t5-small", (1, 16), (128,), OURS, repeats=3, acceptance=0.8)
LARGE = Run("t5-large", "t5-small", (1,), (64,), OURS, acceptance=0.8)
RUNS = (
    XL,
    LARGE,
    dataclasses.replace(XL, batch_sizes=(1,), acceptance=0.6),
    dataclasses.replace(LARGE, acceptance=0.6),
)

COMPARED = ("LLM to SLM", "drafts that pass", "batch", "prompt", "new", "system", "total ms")


def beside_llm(rows: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[list[Any]]:
    """For each system, how many times as fast it is as the LLM alone in the same turns."""
    shape = ("batch_size", "prompt_tokens", "new_tokens")
    of_llm = {
        (run, *(row[key] for key in shape)): row["total_ms"]
        for run, row in rows
        if row["system"] == "llm"
    }
    made = []
    for run, row in rows:
        place = tuple(row[key] for key in shape)
        if alone := of_llm.get((run, *place)):
            name = CONTESTANTS[row["system"]].label
            total = row["total_ms"]
            models = f"{run.llm} to {run.slm}"
            made.append([models, run.acceptance, *place, name, total, alone / total])
    return made


def main() -> int:
    """Measures as much as there is time for; the exit status."""
    options = part.arguments(__doc__.splitlines()[0])
    result = part.Result(options.output)
    runs = [XL.tiny()] if options.rehearse else RUNS
    copied = copy_rate(options.output)
    rows: list[tuple[Run, dict[str, Any]]] = []
    for rows in measure(options, runs, result):
        result.data["rows"] = [{**dataclasses.asdict(r), **row} for r, row in rows]
        result.table(
            "The LLM's own text, drafted",
            (*COMPARED, "times as fast"),
            beside_llm(rows),
            f"Random weights, {dtype_of(options)}, greedy. Drafts pass by chance, with that "
            "probability each.",
        )
        result.table("Their parts", COLUMNS, [cells(run, row, copied) for run, row in rows])
    return part.finish(result, [] if rows else ["nothing was measured"])


if __name__ == "__main__":
    sys.exit(main())
