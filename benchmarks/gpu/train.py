"""The part *train*: one training step of L2S beside transformers with PyTorch.

    python -m benchmarks.gpu.train --output=train.json

Each pair of models is a run of benchmarks/training.py, whose file lies in the folder `train` beside
the output. Whoever is not ready in time is named, and the others are measured.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu import part

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "training.py"
OURS = "l2s_jax"
# Seconds for a pair where there is no limit, and those of them that its turns take at most, which
# the sides cannot spend on getting ready.
PAIR_S, TURNS_S = 120.0, 15.0
SPEEDUP, UTILIZATION = 1.3, 0.4
COLUMNS = (
    "LLM to SLM", "batch", "side", "step ms", "quartiles", "tokens/s", "TFLOP/s", "of peak",
    "times eager PyTorch", "peak GB", "compile s",
)  # fmt: skip
NOTE = (
    "Rows of 128 prompt and 64 response tokens, all full. The LLM is frozen and in bfloat16; "
    "projector and SLM are float32, their products bfloat16. TFLOP are those of the products that "
    "a step has to make; the peak is the published one. Compiled: the whole loss by torch.compile, "
    "or each layer by itself. Times to compile are those of all sides at once."
)


class Pair(NamedTuple):
    """Which models, and how many rows a batch has.

    A batch is so large that a product has 4,096 rows and more of prompts, and small enough for all
    sides' activations to be on a card of 80 GB at the same time.
    """

    llm: str
    slm: str
    batch_size: int

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.llm} to {self.slm}"


PAIRS = (Pair("t5-large", "t5-small", 64), Pair("flan-t5-xl", "t5-base", 32))
REHEARSED = (Pair("tiny", "tiny", 2),)
SIZES = ("--prompt_tokens=128", "--response_tokens=64", "--steps=5", "--repeats=7")
REHEARSED_SIZES = ("--prompt_tokens=8", "--response_tokens=4", "--steps=2", "--repeats=2")
COMPILED = "--compiled=default,per-layer"


def measure(pair: Pair, path: str, rehearse: bool, limit_s: float) -> tuple[dict[str, Any], str]:
    """(what the run left in its file, why it did not end well or "")."""
    ready_s = max(round(limit_s - TURNS_S), 1)
    command = [
        *(sys.executable, str(SCRIPT), f"--llm={pair.llm}", f"--slm={pair.slm}"),
        *(f"--batch_size={pair.batch_size}", "--dtype=bfloat16", "--together"),
        *(f"--ready_s={ready_s}", f"--output={path}"),
        *((*REHEARSED_SIZES, "--threads=1") if rehearse else (*SIZES, COMPILED)),
    ]
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)  # of an earlier call
    # The package need not be installed.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    problem = part.run_command(command, limit_s, {**os.environ, "PYTHONPATH": paths})
    return part.read_json(path) or {"rows": [], "not_measured": {}}, problem


def cells(pair: Pair, row: Mapping[str, Any]) -> list[Any]:
    """A row of a table with COLUMNS."""
    first, third = row["quartiles_ms"]
    return [
        *(pair.name, pair.batch_size, row["name"], row["step_ms"]),
        *(f"{first:.1f} to {third:.1f}", row["tokens_per_s"], row["tflops"], row["mfu"]),
        *(row["speedup"], row["peak_gb"], row["compile_s"]),
    ]


def goals(pair: Pair, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """(pair, goal, what was found, whether it is reached)."""
    ours = next((row for row in rows if row["name"] == OURS), None)
    theirs = [row["step_ms"] for row in rows if row["name"] != OURS]
    ratio = min(theirs) / ours["step_ms"] if ours and theirs else None
    found = (
        (f"at least {SPEEDUP} times as fast as the fastest of PyTorch's sides", SPEEDUP, ratio),
        (f"at least {UTILIZATION:.0%} of the peak", UTILIZATION, ours and ours["mfu"]),
    )
    return [
        [pair.name, text, value, "not measured" if value is None else _verdict(value >= goal)]
        for text, goal, value in found
    ]


def _verdict(reached: bool) -> str:
    return "reached" if reached else "not reached"


def main() -> int:
    """Measures one pair after another; the exit status."""
    began = time.monotonic()
    options = part.arguments(__doc__.splitlines()[0])
    result = part.Result(options.output)
    folder = os.path.join(os.path.dirname(os.path.abspath(options.output)), "train")
    os.makedirs(folder, exist_ok=True)
    pairs = REHEARSED if options.rehearse else PAIRS
    rows: list[list[Any]] = []
    aims: list[list[Any]] = []
    failures: list[str] = []
    result.data["pairs"] = {}
    for done, pair in enumerate(pairs):
        left = options.limit_s - (time.monotonic() - began)
        limit_s = PAIR_S if math.isinf(left) else left / (len(pairs) - done)
        if limit_s < TURNS_S / 3:
            result.skip(pair.name, "no time was left")
            continue
        path = os.path.join(folder, f"{pair.llm}-{pair.slm}.json")
        found, problem = measure(pair, path, options.rehearse, limit_s)
        result.data["pairs"][pair.name] = found
        for name, reason in found["not_measured"].items():
            if name != OURS:
                result.skip(f"{pair.name}: {name}", reason)
        if problem:
            measured = any(row["name"] == OURS for row in found["rows"])
            if measured and OURS not in found["not_measured"]:
                result.skip(f"{pair.name}: the other turns", problem)
            elif part.too_large(problem):
                result.skip(pair.name, f"too large for this card: {problem}")
            else:
                failures.append(f"{pair.name}: {problem}")
        rows += [cells(pair, row) for row in found["rows"]]
        aims += goals(pair, found["rows"])
        result.table("One training step", COLUMNS, rows, NOTE)
        result.table("Goals of training", ("LLM to SLM", "goal", "found", ""), aims)
    return part.finish(result, failures)


if __name__ == "__main__":
    sys.exit(main())
