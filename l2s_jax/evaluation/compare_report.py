"""What a comparison found: compare.json for programs, compare.md and a plot for people.

compare.json is a dictionary:

    task, vary, base, seeds, environment
    rows: system, is_base, settings, variants, answers, params, params_read_per_token, cut_share,
      quality: {metric: mean, sd, seeds}
      latency: as report.json has it at batch 1
      against_base: request_time, token_time (ratios), quality: {metric: as report.json's
        significance; nothing for the base itself}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from l2s_jax.evaluation import numbered, plot
from l2s_jax.evaluation.report import (
    count,
    difference,
    dtypes,
    factor,
    metric_name,
    ms,
    number,
    table,
)  # fmt: skip
from l2s_jax.evaluation.report_check import plain
from l2s_jax.experiment.grid import named, shown
from l2s_jax.files import write_bytes

_NAMES = {"llm": "LLM", "slm": "SLM alone", "l2s": "L2S"}
_COLORS = {"llm": "#333333", "slm": "#8a6d00", "l2s": "#0b62a4"}
_BASE_COLOR = "#a33b3b"
_TIMES = "\N{MULTIPLICATION SIGN}"
_ABSENT = "\N{EN DASH}"


def write(report: Mapping[str, Any], directory: str) -> None:
    """Writes compare.json, compare.md, compare.png and compare.svg; replaces each as a whole."""
    report = plain(report, "comparison")
    figure = quality_time_figure(report)
    files = {
        "compare.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "compare.md": markdown(report).encode(),
        "compare.png": plot.image(figure, "png"),
        "compare.svg": plot.image(figure, "svg"),
    }
    for name, content in files.items():
        write_bytes(os.path.join(directory, name), content)


def row_name(row: Mapping[str, Any]) -> str:
    """A row as people read it."""
    settings = named(row["settings"]).replace(",", ", ")
    base = " (base)" if row["is_base"] else ""
    return f"{', '.join(filter(None, (_NAMES[row['system']], settings)))}{base}"


def markdown(report: Mapping[str, Any]) -> str:
    """The page of a comparison, GitHub-flavoured; it embeds compare.png."""
    task, rows = report["task"], report["rows"]
    varied = "; ".join(f"`{key}`: {_values(values)}" for key, values in report["vary"].items())
    latency = rows[0]["latency"]
    blocks = [
        f"# A comparison on {task['name']}",
        f"Varied: {varied}. The base is the config itself"
        + (f", with {named(report['base']).replace(',', ', ')}." if report["base"] else "."),
        "![Quality against time per request](compare.png)",
        "## Quality and time",
        f"Quality on {task['examples']:,} examples of `{task['split']}`. {_of_seeds(report)}"
        f"Times are medians at batch 1, of {latency['prompt_tokens']} prompt tokens and "
        f"{latency['new_tokens']} new tokens, with products in {dtypes(report['environment'])}; "
        "all rows were measured in turns, in one run. A system that is the same in several "
        "variants has one row.",
        _table(report),
        "*#* is the number in the plot. *Read per token*: parameters read to decode one token. "
        "*Cut*: share of the outputs that `max_new_tokens` cut off.",
        "## Against the base",
        "*Points*: the mean less that of the base. The *interval* holds the difference in 95% of "
        "the resamples of the examples, *p* is how likely a difference of this size is between two "
        "that are equally good, by a paired bootstrap over the examples of the scores' mean over "
        "seeds. It knows of no other seeds than these. *Request* and *token* are times, as "
        "multiples of the base's: below 1 is faster.",
        _against_base(report),
        "## Metrics",
        "\n".join(
            f"- {metric_name(name)}: `{signature}`"
            for name, signature in task["metric_signatures"].items()
        ),
        "All numbers, unrounded, and where the answers are: [compare.json](compare.json). The plot "
        "for a slide: [compare.svg](compare.svg).",
    ]
    return "\n\n".join(blocks) + "\n"


def quality_time_figure(report: Mapping[str, Any]) -> Figure:
    """Primary quality, its mean over seeds, against the time of a request at batch 1 (ms)."""
    task, metric = report["task"], report["task"]["metric"]
    points = []
    for place, row in enumerate(report["rows"]):
        x, y = row["latency"]["total_ms"], row["quality"][metric]
        color = _BASE_COLOR if row["is_base"] else _COLORS[row["system"]]
        label = f"{_spread(y)}, {ms(x)} ms"
        name, spread = row_name(row), y["sd"] or 0.0
        points.append(numbered.Numbered(str(place), name, label, x, y["mean"], spread, color))
    latency = report["rows"][0]["latency"]
    return numbered.scatter(
        points,
        title=f"{metric_name(metric)} and time of {len(points)} systems on {task['name']}",
        subtitle=f"{task['split']}, {task['examples']:,} examples; "
        f"{latency['prompt_tokens']} prompt tokens, {latency['new_tokens']} new tokens; "
        f"{'bars: standard deviation over seeds; ' if len(report['seeds']) > 1 else ''}"
        "the axes do not begin at 0",
        x_label="time per request at batch 1 (ms)",
        y_label=metric_name(metric),
    )


def _table(report: Mapping[str, Any]) -> str:
    metrics = list(report["task"]["metric_signatures"])
    header = (
        "#", "system", "seeds", *map(metric_name, metrics), "cut", "parameters", "read per token",
        "ms per token", "ms per request",
    )  # fmt: skip
    rows = (
        [
            str(place), row_name(row), str(len(row["answers"])),
            *(_spread(row["quality"][name]) for name in metrics),
            number(row["cut_share"], ".1%"), count(row["params"]),
            count(row["params_read_per_token"]), ms(row["latency"]["decode_ms_per_token"]),
            ms(row["latency"]["total_ms"]),
        ]
        for place, row in enumerate(report["rows"], 1)
    )  # fmt: skip
    return table(header, rows, left=2)


def _against_base(report: Mapping[str, Any]) -> str:
    header = ("system", "metric", "points", "95% interval", "p", "request", "token")
    rows = [
        [
            row_name(row), metric_name(metric), *difference(found),
            *_ratios(row["against_base"]),
        ]
        for row in report["rows"]
        for metric, found in row["against_base"]["quality"].items()
    ]  # fmt: skip
    return table(header, rows, left=2)


def _ratios(against: Mapping[str, Any]) -> list[str]:
    values = (against["request_time"], against["token_time"])
    return [_ABSENT if value is None else f"{factor(value)}{_TIMES}" for value in values]


def _spread(quality: Mapping[str, Any]) -> str:
    deviation = "" if quality["sd"] is None else f" \N{PLUS-MINUS SIGN} {quality['sd']:.1f}"
    return f"{quality['mean']:.1f}{deviation}"


def _of_seeds(report: Mapping[str, Any]) -> str:
    if len(report["seeds"]) < 2:
        return ""
    return (
        f"The SLM alone and L2S were trained from {len(report['seeds'])} seeds each: scores are "
        "the mean over them \N{PLUS-MINUS SIGN} their standard deviation (n - 1). "
    )


def _values(values: list[Any]) -> str:
    return ", ".join(f"`{shown(value)}`" for value in values)
