"""The part *serve*: whole requests of L2S, its LLM and SLM, beside transformers and TensorRT-LLM.

    python -m benchmarks.gpu.serve --output=serve.json

TensorRT-LLM's figures are the published ones, of its PyTorch backend, for Flan-T5-XL on one H100
80 GB in bfloat16, greedy, with prompts of 260 to 440 tokens and at most 128 new tokens. Here every
prompt has 440 tokens and every response 128, the most that those may have.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.gpu import part
from benchmarks.gpu.runs import COLUMNS, Run, cells, copy_rate, dtype_of, folder_of, measure
from l2s_jax.bench.contestants import CONTESTANTS
from l2s_jax.evaluation.plot import image

# Rows -> milliseconds of a batch, and what it makes in tokens/s.
TENSORRT_LLM = {32: (706.0, 3312.0), 64: (1137.0, 4184.0), 128: (1999.0, 4768.0)}

XL = {"llm": "flan-t5-xl", "prompt_tokens": 440, "new_tokens": (128,), "repeats": 3}
LARGE = {"llm": "t5-large", "slm": "t5-small"}
# The most important first: the time may end.
RUNS = (
    Run(**XL, slm="t5-base", batch_sizes=(32,), ours=("l2s", "llm"), peers=("hf-llm",)),
    Run(
        **LARGE,
        batch_sizes=(1,),
        new_tokens=(64,),
        ours=("l2s", "llm", "slm"),
        peers=("hf-llm", "hf-slm"),
    ),
    Run(**XL, slm="t5-base", batch_sizes=(128, 64), ours=("l2s", "llm")),
    Run(**LARGE, batch_sizes=(8, 32), new_tokens=(64,), ours=("l2s", "llm", "slm")),
    Run(**LARGE, batch_sizes=(1,), new_tokens=(64,), ours=("slm",), peers=("hf-slm-compiled",)),
    Run(**LARGE, batch_sizes=(1, 8, 32), new_tokens=(256,), ours=("l2s", "llm", "slm")),
    Run(**XL, slm="t5-small", batch_sizes=(32, 128, 64), ours=("l2s",)),
    Run(**XL, slm="gpt2", batch_sizes=(32, 128, 64), ours=("l2s",)),
    Run(
        **LARGE,
        batch_sizes=(8, 32),
        new_tokens=(64,),
        ours=("slm",),
        peers=("hf-llm", "hf-slm"),
        repeats=3,
    ),
    Run(**LARGE, batch_sizes=(1,), new_tokens=(64,), ours=("llm",), peers=("hf-llm-compiled",)),
)
# What a rehearsal needs to go through all of the code: two runs, one of which has a peer.
REHEARSED = (0, 6)


def beside_tensorrt_llm(rows: Sequence[tuple[Run, dict[str, Any]]]) -> list[list[Any]]:
    """For each of our systems in the published setting, how many times as fast it is."""
    made = []
    for run, row in rows:
        published = TENSORRT_LLM.get(row["batch_size"])
        if run.llm != XL["llm"] or not published:
            continue
        made.append(
            [
                f"{run.llm} to {run.slm}",
                row["system"],
                row["batch_size"],
                row["total_ms"],
                published[0],
                published[0] / row["total_ms"],
            ]
        )
    return made


def figure(rows: Sequence[tuple[Run, dict[str, Any]]]) -> Figure:
    """Milliseconds of a batch against its rows, in the published setting, or of all that there is.

    A line for each of our systems, and TensorRT-LLM's.
    """
    published = [(run, row) for run, row in rows if run.llm == XL["llm"]]
    lines: dict[str, list[tuple[int, float]]] = {}
    for run, row in published or rows:
        name = f"{CONTESTANTS[row['system']].label}: {run.llm}"
        if row["system"].startswith("l2s"):
            name += f" to {run.slm}"
        lines.setdefault(name, []).append((row["batch_size"], row["total_ms"]))
    if published:
        lines["TensorRT-LLM: flan-t5-xl (published)"] = [
            (batch, ms) for batch, (ms, _) in TENSORRT_LLM.items()
        ]
    made = Figure(figsize=(10, 5.625), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    axes = made.add_axes((0.09, 0.13, 0.54, 0.74))
    axes.set_title("440 prompt and 128 new tokens" if published else "Whole requests", loc="left")
    axes.set_xlabel("rows of a batch")
    axes.set_ylabel("ms per batch")
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({batch for points in lines.values() for batch, _ in points}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return made


def main() -> int:
    """Measures as much as there is time for; the exit status."""
    options = part.arguments(__doc__.splitlines()[0])
    result = part.Result(options.output)
    runs = [RUNS[i].tiny() for i in REHEARSED] if options.rehearse else RUNS
    copied = copy_rate(options.output)
    rows: list[tuple[Run, dict[str, Any]]] = []
    for rows in measure(options, runs, result):
        result.data["rows"] = [{"llm": r.llm, "slm": r.slm, **row} for r, row in rows]
        result.table(
            "Whole requests",
            COLUMNS,
            [cells(run, row, copied) for run, row in rows],
            f"Random weights, {dtype_of(options)}, greedy. The floor: weights and cache read once "
            "at the rate of a large copy.",
        )
        if beside := beside_tensorrt_llm(rows):
            result.table(
                "Beside TensorRT-LLM's Flan-T5-XL",
                ("LLM to SLM", "system", "batch", "total ms", "TensorRT-LLM ms", "times as fast"),
                beside,
                "TensorRT-LLM's figures are published ones, for one H100 80 GB in bfloat16, with "
                "prompts of 260 to 440 tokens and at most 128 new ones. Here all prompts have 440, "
                "and all responses 128.",
            )
        with open(f"{folder_of(options)}.png", "wb") as file:
            file.write(image(figure(rows), "png"))
    return part.finish(result, [] if rows else ["nothing was measured"])


if __name__ == "__main__":
    sys.exit(main())
