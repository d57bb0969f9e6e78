"""What an evaluation found: report.json for programs, report.md and a plot for people.

The report is a dictionary; report_check.py lists its keys.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from l2s_jax.evaluation import distilled, exactness, plot
from l2s_jax.evaluation.report_check import RATIOS, SYSTEMS, check, plain
from l2s_jax.files import make_folder, write_bytes

_NAMES = {
    "llm": "LLM", "slm": "SLM alone", "l2s": "L2S", "l2s_mismatched": "L2S, mismatched",
    "exact": "exact",
}  # fmt: skip
_METRIC_NAMES = {
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum", "exact_match": "exact match", "comet": "COMET",
}  # fmt: skip
_LABELS = {"data": "the responses in the data", "llm": "responses that the LLM generated"}
_COLORS = {
    "llm": "#333333", "slm": "#8a6d00", "l2s": "#0b62a4", "l2s_mismatched": "#a33b3b",
    "exact": "#2f7d32",
}  # fmt: skip
_OTHER_COLOR = "#5b5b5b"
_TIMES = "\N{MULTIPLICATION SIGN}"
_ABSENT = "\N{EN DASH}"


def compare(systems: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The report's "l2s_vs_llm": ratios above 1 favour L2S; NaN where the LLM scores nothing.

    `quality_ratio` is L2S / LLM on `metric`; `speedup` and `speedup_batch` are LLM / L2S of the
    total time at batch 1 and at the larger batch, `decode_speedup` of the time per decoded token.
    """
    if "llm" not in systems:
        return dict.fromkeys(RATIOS, math.nan)
    llm, l2s = systems["llm"], systems["l2s"]
    return {
        "quality_ratio": _ratio(l2s["quality"][metric], llm["quality"][metric]),
        "speedup": _ratio(llm["latency"]["total_ms"], l2s["latency"]["total_ms"]),
        "decode_speedup": _ratio(
            llm["latency"]["decode_ms_per_token"], l2s["latency"]["decode_ms_per_token"]
        ),
        "speedup_batch": _ratio(llm["latency_batch"]["total_ms"], l2s["latency_batch"]["total_ms"]),
    }


def write_report(report: Mapping[str, Any], directory: str) -> None:
    """Writes report.json, report.md, quality_latency.png and .svg; replaces each as a whole.

    report.json keeps every number in full; one that is not finite becomes null. Nothing is written
    if the report is refused.

    Raises:
      ValueError: a key is missing, or the primary quality or a total time is no usable number.
    """
    report = plain(report, "report")
    check(report)
    figure = quality_latency_figure(report)
    files = {
        "report.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "report.md": markdown(report).encode(),
        "quality_latency.png": plot.image(figure, "png"),
        "quality_latency.svg": plot.image(figure, "svg"),
    }
    make_folder(directory)
    for name, content in files.items():
        write_bytes(os.path.join(directory, name), content)


def markdown(report: Mapping[str, Any]) -> str:
    """The page of a checked report, GitHub-flavoured; it embeds quality_latency.png."""
    task, systems, ratios = report["task"], report["systems"], report["l2s_vs_llm"]
    batch_size = systems["l2s"]["latency_batch"]["batch_size"]
    trained = f"{_LABELS.get(task['labels'], task['labels'])}{distilled.clause(task)}"
    blocks = [
        f"# LLM-to-SLM on {task['name']}",
        f"**{_conclusion(report)}**",
        "![Quality against latency of each system](quality_latency.png)",
        "## Systems",
        f"Quality on {task['examples']:,} examples of `{task['split']}`; the SLM and L2S were "
        f"trained on {trained}. Times are those of one request at batch 1.",
        _systems_table(report),
        "\n".join(f"- **{_name(key)}**: {s['description']}" for key, s in systems.items()),
        "*Read per token*: parameters read to decode one token. *Cut*: share of the outputs that "
        "`max_new_tokens` cut off. *Speedup*: the LLM's total time over this system's. "
        "*Mismatched* is the control: L2S fed the representations of another prompt, whose quality "
        "collapses if L2S relies on the LLM.",
        *_significance(report),
        *(exactness.lines(systems["exact"]["drafts"]) if "exact" in systems else ()),
        *_dial(report.get("dial", "")),
        "## Latency",
        f"{_speedups(ratios, batch_size)}Times are medians after warm-up, for the whole batch. "
        "Compilation happens once per shape and is in no other column. "
        f"Products are in {dtypes(report['environment'])}.",
        f"### Batch {systems['l2s']['latency']['batch_size']}",
        _latency_table(systems, "latency"),
        f"### Batch {batch_size}",
        _latency_table(systems, "latency_batch"),
        *_time(report.get("time", {})),
        "## Environment",
        table(("", ""), ([k, _text(v)] for k, v in report["environment"].items()), left=2),
        "## Metrics",
        "\n".join(
            f"- {metric_name(name)}: `{signature}`"
            for name, signature in task["metric_signatures"].items()
        ),
        "All numbers, unrounded: [report.json](report.json). The plot for a slide: "
        "[quality_latency.svg](quality_latency.svg).",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def quality_latency_figure(report: Mapping[str, Any]) -> Figure:
    """Primary quality against total latency at batch 1 (ms) of a checked report."""
    task, latency = report["task"], report["systems"]["l2s"]["latency"]
    metric = task["metric"]
    points = []
    for key, system in report["systems"].items():
        x, y = system["latency"]["total_ms"], system["quality"][metric]
        is_control = key == "l2s_mismatched"
        label = f"{'control: ' if is_control else ''}{y:.1f} {metric_name(metric)}, {ms(x)} ms"
        color = _COLORS.get(key, _OTHER_COLOR)
        points.append(plot.Point(key, _name(key), label, x, y, color, hollow=is_control))
    return plot.scatter(
        points,
        title=_finding(report),
        subtitle=f"{task['name']}, {task['split']}, {task['examples']:,} examples; "
        f"{latency['prompt_tokens']} prompt tokens, {latency['new_tokens']} new tokens",
        x_label="time per request at batch 1 (ms)",
        y_label=metric_name(metric),
    )


def dtypes(environment: Mapping[str, Any]) -> str:
    """The dtype of the products, and that of L2S's LLM where it encodes in another one."""
    dtype, encoder_dtype = environment["dtype"], environment["encoder_dtype"]
    return dtype if encoder_dtype == dtype else f"{dtype}, the LLM of L2S in {encoder_dtype}"


def _systems_table(report: Mapping[str, Any]) -> str:
    systems = report["systems"]
    metrics = list(dict.fromkeys(m for s in systems.values() for m in s["quality"]))
    metrics.sort(key=lambda metric: metric != report["task"]["metric"])
    header = (
        "system", "parameters", "read per token", *(metric_name(m) for m in metrics), "cut",
        "ms per token", "total ms", "speedup",
    )  # fmt: skip
    rows = (
        [
            _name(key), count(s["params"]), count(s["params_read_per_token"]),
            *(number(s["quality"].get(m), ".1f") for m in metrics),
            number(s["cut_share"], ".1%"), ms(s["latency"]["decode_ms_per_token"]),
            ms(s["latency"]["total_ms"]), _speedup(systems, key, "latency"),
        ]
        for key, s in systems.items()
    )  # fmt: skip
    return table(header, rows)


def _significance(report: Mapping[str, Any]) -> list[str]:
    """The blocks of a section, none where nothing was tested."""
    pairs = report.get("significance", {})
    header = ("difference", "metric", "points", "95% interval", "p")
    rows = [
        [
            " less ".join(_name(key) for key in pair.split("_vs_")), metric_name(metric),
            *difference(found),
        ]
        for pair, metrics in pairs.items()
        for metric, found in metrics.items()
    ]  # fmt: skip
    if not rows:
        return []
    return [
        "## Differences",
        "*p* is how likely a difference of this size is between two systems that are equally good, "
        "by a paired bootstrap over the examples; below 0.05 it is usually called significant. "
        "The *interval* holds the difference in 95% of the resamples. sacreBLEU's p of BLEU and "
        "chrF is close to that of a one-sided test, so that it can be below 0.05 where the "
        "interval holds 0.",
        table(header, rows, left=2),
    ]


def _dial(conclusion: str) -> list[str]:
    """The blocks of a section, none where there is no dial."""
    if not conclusion:
        return []
    picture = "![Quality and likeness to the LLM's text, against time per request](dial.png)"
    return ["## The dial", f"{conclusion} All of it: [dial.md](dial.md).", picture]


def _time(stages: Mapping[str, Any]) -> list[str]:
    """The blocks of a section, none in a report that does not know."""
    if not stages:
        return []
    rows = (
        [name, f"{s['seconds']:,.1f}", *(f"{share:.1%}" for share in s["shares"].values())]
        for name, s in stages.items()
    )
    kinds = next(iter(stages.values()))["shares"]
    return [
        "## Time",
        "Wall time of each stage, of all runs that made it together, and the shares of it: JAX's "
        "*compiling*, waiting for *data*, *steps*, *saving* checkpoints, *evaluating*, and all "
        "*other* work. That of the evaluation ends where this report is written.",
        table(("stage", "seconds", *kinds), rows),
    ]


def difference(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """(points, 95% interval, p) of what `significance` found."""
    interval = f"{found['low']:+.1f} to {found['high']:+.1f}"
    p = "below 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"
    return f"{found['difference']:+.1f}", interval, p


def _latency_table(systems: Mapping[str, Any], key: str) -> str:
    header = (
        "system", "prompt tokens", "new tokens", "encode ms", "prefill ms", "ms per token",
        "total ms", "speedup", "compile s",
    )  # fmt: skip
    rows = (
        [
            _name(name), str(s[key]["prompt_tokens"]), str(s[key]["new_tokens"]),
            ms(s[key]["encode_ms"]), ms(s[key]["prefill_ms"]), ms(s[key]["decode_ms_per_token"]),
            ms(s[key]["total_ms"]), _speedup(systems, name, key),
            number(s[key]["compile_s"], ".1f"),
        ]
        for name, s in systems.items()
    )  # fmt: skip
    return table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, its source aligned; all but the first `left` columns align right."""
    cells = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(
        "| " + " | ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ) + " |"
        for row in (cells[0], rule, *cells[1:])
    )  # fmt: skip


def _finding(report: Mapping[str, Any]) -> str:
    ratios, metric = report["l2s_vs_llm"], metric_name(report["task"]["metric"])
    if "llm" not in report["systems"]:
        return f"L2S on an LLM that only encodes, scored by {metric}"
    if ratios["quality_ratio"] is None:
        return f"The LLM scores no {metric} for L2S to keep"
    verb = "keeps" if ratios["quality_ratio"] <= 1 else "reaches"
    quality = f"{ratios['quality_ratio']:.1%} of the LLM's {metric}"
    return f"L2S {verb} {quality} at {factor(ratios['speedup'])}{_TIMES} the speed"


def _conclusion(report: Mapping[str, Any]) -> str:
    metric = report["task"]["metric"]
    quality = {name: s["quality"][metric] for name, s in report["systems"].items()}
    slm, l2s, control = (quality[name] for name in SYSTEMS[1:])
    beside = f" against {quality['llm']:.1f}" if "llm" in quality else ""
    side = "below" if slm <= l2s else "above"
    collapse = "collapses to" if control < l2s / 2 else "does not collapse but reaches"
    return (
        f"{_finding(report)} ({l2s:.1f}{beside}); the SLM alone reaches {slm:.1f}, "
        f"{abs(l2s - slm):.1f} points {side} L2S; fed another prompt's representations, "
        f"L2S {collapse} {control:.1f}."
    )


def _speedups(ratios: Mapping[str, Any], batch_size: int) -> str:
    """A sentence for an LLM that was measured too."""
    if ratios["speedup"] is None:
        return ""
    of_token = f"L2S decodes a token {factor(ratios['decode_speedup'])} times as fast as the LLM. "
    if ratios["decode_speedup"] is None:
        of_token = "What L2S takes for a token is lost in noise: more tokens took no longer. "
    return (
        f"{of_token}A whole request is {factor(ratios['speedup'])} times as fast at batch 1, a "
        f"batch of {batch_size} {factor(ratios['speedup_batch'])} times. "
    )


def _name(key: str) -> str:
    return _NAMES.get(key, key)


def metric_name(metric: str) -> str:
    """A metric as people read it."""
    return _METRIC_NAMES.get(metric, metric)


def number(value: float | None, spec: str) -> str:
    """A number by a format, a dash for none."""
    return _ABSENT if value is None else format(value, spec)


def _speedup(systems: Mapping[str, Any], name: str, latency: str) -> str:
    if "llm" not in systems:
        return _ABSENT
    ratio = systems["llm"][latency]["total_ms"] / systems[name][latency]["total_ms"]
    return f"{factor(ratio)}{_TIMES}"


def factor(value: float | None) -> str:
    """A ratio, without a sign."""
    return number(value, ".2f" if (value or 0) < 10 else ".1f")


def ms(value: float | None) -> str:
    """Milliseconds, in about three figures."""
    size = abs(value or 0)
    return number(value, f",.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3}f")


def count(value: float) -> str:
    """A number of parameters."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return _ABSENT if value is None else str(value)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
