"""What a benchmark found: a JSON file for programs, Markdown and plots for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from l2s_jax.bench.contestants import CONTESTANTS, OURS
from l2s_jax.evaluation.plot import image
from l2s_jax.files import finite, write_bytes, write_json, write_text

_CASE = ("batch_size", "prompt_tokens", "new_tokens")
_COLORS = {
    "l2s": "#0b62a4",
    "l2s-bfloat16": "#6aaedd",
    "l2s-int8": "#a9d3f0",
    "l2s-cut": "#06365a",
    "exact": "#2f5d7d",
    "llm": "#333333",
    "llm-int8": "#777777",
    "slm": "#8a6d00",
    "slm-int8": "#c9b15c",
    "slm-cut": "#4d3c00",
    "hf-llm": "#a33b3b",
    "hf-slm": "#d98c8c",
    "hf-llm-bfloat16": "#c4577f",
    "hf-slm-bfloat16": "#e3a5bd",
    "hf-llm-compiled": "#7a3ba3",
    "hf-slm-compiled": "#b58cd9",
    "hf-llm-assisted": "#a35f3b",
    "ct2-llm": "#2f7d4f",
    "ct2-slm": "#7fbf9b",
    "ct2-llm-int8": "#1f5f6f",
    "ct2-slm-int8": "#6fb0bf",
    "ov-llm": "#54457f",
    "ov-slm": "#9184bd",
    "ov-llm-int8": "#2e3f8f",
    "ov-slm-int8": "#7d8ed1",
}


def write_report(report: Mapping[str, Any], stem: str) -> None:
    """Writes STEM.json, STEM.md and the plots STEM-*.png; replaces each as a whole."""
    results = report["rows"]
    write_json(f"{stem}.json", finite(report))
    write_text(f"{stem}.md", markdown(report))
    for name, figure in (
        ("latency", _latency(results)),
        ("speedup", _speedup(results)),
        ("shares", _shares(results)),
    ):
        if figure is not None:
            write_bytes(f"{stem}-{name}.png", image(figure, "png"))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, one table per case."""
    environment = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    lines = [
        f"# {report['llm']} to {report['slm']}, {report['dtype']}",
        "",
        f"Weights: {report['weights']}. Medians of {report['repeats']} runs, in which everybody "
        f"took a turn while all others were stopped, after warm-up. {environment}.",
        "",
        "*First token*: from the start. *Floor*: the time in which a plain compiled program reads "
        "as many bytes as the weights and the cache have that a step reads; measured in the same "
        "turns. *Quartiles*: of the total, the first and the third. *Speedup*: our LLM's total "
        "over this one's. *Peak*: the most memory while the case was measured, of the accelerator "
        "where there is one (there ours, since the process began). *Compile*: of our program; of "
        "others, what the first run took longer than the second. *Settings*: of other libraries, "
        "those that were the fastest.",
    ]
    for case, records in _cases(report["rows"]):
        lines += ["", f"## Batch {case[0]}, {case[1]} prompt tokens, {case[2]} new tokens", ""]
        lines += _table(records)
    if report["not_measured"]:
        lines += ["", "## Not measured", ""]
        for name, reason in report["not_measured"].items():
            lines.append(f"- {CONTESTANTS[name].label}: {reason}")
    return "\n".join(lines) + "\n"


def _cases(
    results: Sequence[Mapping[str, Any]],
) -> Iterable[tuple[tuple[int, ...], list[Mapping[str, Any]]]]:
    cases: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for record in results:
        cases.setdefault(tuple(record[key] for key in _CASE), []).append(record)
    return cases.items()


def _table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = (
        "system", "encode ms", "first token ms", "ms per token", "times the floor", "total ms",
        "quartiles", "tokens/s", "speedup", "peak GB", "compile s", "settings",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 2) + "|---|"]
    (llm,) = [r["total_ms"] for r in records if r["system"] == "llm"] or [math.nan]
    for record in records:
        floor = record["decode_ms_per_token"] / record.get("floor_ms_per_token", math.nan)
        times = map(_number, (
            record["encode_ms"], record["first_token_ms"], record["decode_ms_per_token"], floor,
            record["total_ms"],
        ))  # fmt: skip
        others = map(_number, (
            record["tokens_per_s"], llm / record["total_ms"], record["peak_memory_mb"] / 1e3,
            record["compile_s"],
        ))  # fmt: skip
        spread = " to ".join(map(_number, record["quartiles"]["total_ms"]))
        settings = "" if record["system"] in OURS else record["settings"]
        cells = (CONTESTANTS[record["system"]].label, *times, spread, *others, settings)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, 5.625), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, 0.58, 0.74))
    axes.set_title(title, fontsize=15, loc="left", weight="bold")
    axes.set_xlabel(x_label, fontsize=13)
    axes.set_ylabel(y_label, fontsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(
    axes: Any, results: Sequence[Mapping[str, Any]], x: str, y: str, ticks: Sequence[int]
) -> None:
    for name in dict.fromkeys(record["system"] for record in results):
        points = sorted((r[x], r[y]) for r in results if r["system"] == name)
        axes.plot(
            *zip(*points, strict=True), "o-", label=CONTESTANTS[name].label, color=_COLORS[name]
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=11)


def _at(results: Sequence[Mapping[str, Any]], **fixed: int) -> list[Mapping[str, Any]]:
    return [r for r in results if all(r[key] == value for key, value in fixed.items())]


def _values(results: Sequence[Mapping[str, Any]], key: str) -> list[int]:
    return sorted({record[key] for record in results})


def _latency(results: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Total time against new tokens, at the smallest batch and the middle prompt."""
    prompts, batches = _values(results, "prompt_tokens"), _values(results, "batch_size")
    fixed = {"prompt_tokens": prompts[len(prompts) // 2], "batch_size": batches[0]}
    title = f"Batch {fixed['batch_size']}, {fixed['prompt_tokens']} prompt tokens"
    figure, axes = _axes(title, "new tokens", "ms per batch")
    _lines(axes, _at(results, **fixed), "new_tokens", "total_ms", _values(results, "new_tokens"))
    axes.set_yscale("log")
    return figure


def _speedup(results: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How many times as fast as our LLM, against the batch size."""
    prompts, new = _values(results, "prompt_tokens"), _values(results, "new_tokens")
    fixed = {"prompt_tokens": prompts[len(prompts) // 2], "new_tokens": new[len(new) // 2]}
    chosen = _at(results, **fixed)
    llm = {r["batch_size"]: r["total_ms"] for r in chosen if r["system"] == "llm"}
    ratios = [
        {**r, "speedup": llm[r["batch_size"]] / r["total_ms"]}
        for r in chosen
        if r["batch_size"] in llm
    ]
    if not ratios:
        return None
    title = f"{fixed['prompt_tokens']} prompt tokens, {fixed['new_tokens']} new tokens"
    figure, axes = _axes(title, "batch size", "times as fast as our LLM")
    _lines(axes, ratios, "batch_size", "speedup", _values(results, "batch_size"))
    axes.set_ylim(bottom=0)
    return figure


def _shares(results: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Of our systems: where the time goes, by case."""
    ours = [r for r in results if r["system"] in OURS]
    if not ours:
        return None
    new, batches = _values(ours, "new_tokens"), _values(ours, "batch_size")
    chosen = _at(ours, new_tokens=new[len(new) // 2], batch_size=batches[0])
    title = f"Batch {batches[0]}, {new[len(new) // 2]} new tokens"
    figure, axes = _axes(title, "share of the time", "system, prompt tokens")
    axes.set_position((0.28, 0.13, 0.54, 0.74))
    rows = [f"{CONTESTANTS[r['system']].label}, {r['prompt_tokens']}" for r in chosen]
    left = [0.0] * len(chosen)
    for part, color in (("encode", "#0b62a4"), ("prefill", "#8a6d00"), ("decode", "#999999")):
        shares = [_parts(record)[part] for record in chosen]
        axes.barh(rows, shares, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=11)
    return figure


def _parts(record: Mapping[str, Any]) -> dict[str, float]:
    """Shares of the time that encoding, prefill and decoding take."""
    times = {
        "encode": record["encode_ms"],
        # A median of each: where prefill takes next to nothing, noise may put it below.
        "prefill": max(record["first_token_ms"] - record["encode_ms"], 0.0),
        "decode": record["decode_ms_per_token"] * max(record["new_tokens"] - 1, 0),
    }
    whole = sum(times.values())
    return {name: time / whole for name, time in times.items()}
