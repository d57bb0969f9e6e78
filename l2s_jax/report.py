"""What an evaluation found: report.json for programs, report.md and a plot for people.

The report is a dictionary; `_TASK`, `_SYSTEM` and `_LATENCY` below list its keys. Times are in
milliseconds (compile times in seconds), shares in [0, 1], quality on each metric's own scale.
"""

import io
import itertools
import json
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, TextArea, VPacker
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

_TASK = ("name", "split", "examples", "metric", "metric_signatures", "labels")
_SYSTEMS = ("llm", "slm", "l2s", "l2s_mismatched")
_SYSTEM = (
    "description", "params", "params_read_per_token", "quality", "cut_share", "latency",
    "latency_batch",
)  # fmt: skip
_LATENCY = (
    "batch_size", "prompt_tokens", "new_tokens", "encode_ms", "prefill_ms", "decode_ms_per_token",
    "total_ms", "compile_s",
)  # fmt: skip
_RATIOS = ("quality_ratio", "speedup", "decode_speedup", "speedup_batch")

_NAMES = {"llm": "LLM", "slm": "SLM alone", "l2s": "L2S", "l2s_mismatched": "L2S, mismatched"}
_METRIC_NAMES = {
    "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum", "exact_match": "exact match",
}  # fmt: skip
_LABELS = {"data": "the responses in the data", "llm": "responses that the LLM generated"}
_COLORS = {"llm": "#333333", "slm": "#8a6d00", "l2s": "#0b62a4", "l2s_mismatched": "#a33b3b"}
_OTHER_COLOR = "#5b5b5b"
_MARKER = 18  # points across, the air around it included
_LOG_RANGE = 12.0
_TIMES = "\N{MULTIPLICATION SIGN}"
_ABSENT = "\N{EN DASH}"


def compare(systems: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The report's "l2s_vs_llm": ratios above 1 favour L2S; NaN where the LLM has nothing to keep.

    `quality_ratio` is L2S / LLM on `metric`; `speedup` and `speedup_batch` are LLM / L2S of the
    total time at batch 1 and at the larger batch, `decode_speedup` of the time per decoded token.
    """
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
    report = _plain(report, "report")
    _check(report)
    figure = quality_latency_figure(report)
    files = {
        "report.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
        "report.md": markdown(report).encode(),
        "quality_latency.png": _image(figure, "png"),
        "quality_latency.svg": _image(figure, "svg"),
    }
    os.makedirs(directory, exist_ok=True)
    for name, content in files.items():
        path = os.path.join(directory, name)
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
        os.replace(f"{path}.tmp", path)


def markdown(report: Mapping[str, Any]) -> str:
    """The page of a checked report, GitHub-flavoured; it embeds quality_latency.png."""
    task, systems, ratios = report["task"], report["systems"], report["l2s_vs_llm"]
    batch_size = systems["l2s"]["latency_batch"]["batch_size"]
    trained = _LABELS.get(task["labels"], task["labels"])
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
        "## Latency",
        f"L2S decodes a token {_factor(ratios['decode_speedup'])} times as fast as the LLM. A "
        f"whole request is {_factor(ratios['speedup'])} times as fast at batch 1, a batch of "
        f"{batch_size} {_factor(ratios['speedup_batch'])} times. Times are medians after warm-up, "
        "for the whole batch. Compilation happens once per shape and is in no other column.",
        f"### Batch {systems['l2s']['latency']['batch_size']}",
        _latency_table(systems, "latency"),
        f"### Batch {batch_size}",
        _latency_table(systems, "latency_batch"),
        "## Environment",
        _table(("", ""), ([k, _text(v)] for k, v in report["environment"].items()), left=2),
        "## Metrics",
        "\n".join(
            f"- {_metric_name(name)}: `{signature}`"
            for name, signature in task["metric_signatures"].items()
        ),
        "All numbers, unrounded: [report.json](report.json). The plot for a slide: "
        "[quality_latency.svg](quality_latency.svg).",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def quality_latency_figure(report: Mapping[str, Any]) -> Figure:
    """Primary quality against total latency at batch 1 (ms) of a checked report.

    One directly labelled point per system; the artist of each label has the system's key as its
    gid. The x axis is logarithmic where latencies span more than a factor of 12.
    """
    figure = Figure(figsize=(10, 5.625), dpi=200, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.135, 0.885, 0.675))
    points = _points(report)
    _style_axes(axes, report, points)
    for point in points:
        fill = "white" if point.key == "l2s_mismatched" else point.color
        axes.plot(
            point.x, point.y, "o", markersize=_MARKER - 4, color=point.color, markerfacecolor=fill,
            markeredgewidth=2.5, clip_on=False,
        )  # fmt: skip
    _write_title(figure, report, canvas.get_renderer())
    _place_labels(axes, points, canvas.get_renderer())
    return figure


class _Point(NamedTuple):
    key: str
    x: float
    y: float
    color: str
    label: str


def _points(report: Mapping[str, Any]) -> list[_Point]:
    metric = report["task"]["metric"]
    points = []
    for key, system in report["systems"].items():
        x, y = system["latency"]["total_ms"], system["quality"][metric]
        prefix = "control: " if key == "l2s_mismatched" else ""
        label = f"{prefix}{y:.1f} {_metric_name(metric)}, {_ms(x)} ms"
        points.append(_Point(key, x, y, _COLORS.get(key, _OTHER_COLOR), label))
    return points


def _style_axes(axes: Axes, report: Mapping[str, Any], points: Sequence[_Point]) -> None:
    xs, ys = [p.x for p in points], [p.y for p in points]
    top = max(*ys, 1e-6)
    if max(xs) > _LOG_RANGE * min(xs):
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 2, max(xs) * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.2 * max(xs))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    low, high = min(0.0, *ys), 1.28 * top
    ticks = MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if tick < high and (tick <= 100 or tick <= top)])
    axes.set_ylim(low - 0.05 * top, high)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=14, color="#999999", labelcolor="#444444")
    axes.set_xlabel("time per request at batch 1 (ms)", fontsize=15, color="#444444", labelpad=8)
    axes.set_ylabel(
        _metric_name(report["task"]["metric"]), fontsize=15, color="#444444", labelpad=8
    )


def _write_title(figure: Figure, report: Mapping[str, Any], renderer: Any) -> None:
    task, latency = report["task"], report["systems"]["l2s"]["latency"]
    subtitle = (
        f"{task['name']}, {task['split']}, {task['examples']:,} examples; "
        f"{latency['prompt_tokens']} prompt tokens, {latency['new_tokens']} new tokens"
    )
    style = {"x": 0.02, "ha": "left", "va": "baseline", "parse_math": False}
    lines = (
        figure.text(y=0.915, s=_finding(report), fontsize=20, weight="bold", **style),
        figure.text(y=0.855, s=subtitle, fontsize=14, color="#666666", **style),
    )
    for line in lines:
        excess = line.get_window_extent(renderer).width / (0.96 * figure.bbox.width)
        line.set_fontsize(line.get_fontsize() / max(1.0, excess))


def _place_labels(axes: Axes, points: Sequence[_Point], renderer: Any) -> None:
    """Puts the labels near their points, where they overlap no marker and no other label."""
    pixels = axes.figure.dpi / 72
    centers = axes.transData.transform([(p.x, p.y) for p in points])
    sizes = [_label(p, "left", axes.figure).get_bbox(renderer).size for p in points]
    left, bottom, _, top = axes.bbox.extents
    allowed = Bbox.from_extents(left, bottom, axes.figure.bbox.x1, top).padded(-3 * pixels)
    # Who is placed first decides who must move away: take the order that suits all best.
    orders = itertools.islice(itertools.permutations(range(len(points))), 24)
    plans = (_arrange(order, centers, sizes, allowed, pixels) for order in orders)
    for index, place in min(plans, key=lambda plan: sum(p.cost for p in plan.values())).items():
        point, center = points[index], centers[index]
        leader = _leader(center, place.box)
        if np.ptp(leader.vertices, axis=0).max() > 1.5 * _MARKER * pixels:
            ends = axes.transData.inverted().transform(leader.vertices)
            axes.plot(*ends.T, color=point.color, linewidth=1, alpha=0.6, zorder=1, clip_on=False)
        artist = AnnotationBbox(
            _label(point, place.align, axes.figure), (point.x, point.y),
            xybox=tuple((place.box.p0 - center) / pixels), boxcoords="offset points",
            box_alignment=(0, 0), frameon=False, pad=0, annotation_clip=False,
        )  # fmt: skip
        artist.set_gid(point.key)
        axes.add_artist(artist)


class _Place(NamedTuple):
    box: Bbox
    align: str
    cost: int


def _arrange(
    order: Sequence[int], centers: Any, sizes: Any, allowed: Bbox, pixels: float
) -> dict[int, _Place]:
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(_MARKER / 2 * pixels) for x, y in centers]
    places = {}
    for index in order:
        places[index] = _free_place(centers[index], sizes[index], taken, allowed, pixels)
        taken.append(places[index].box.padded(3 * pixels))
    return places


def _label(point: _Point, align: str, figure: Figure) -> VPacker:
    style = {"color": point.color, "parse_math": False}
    lines = [
        TextArea(_name(point.key), textprops={"fontsize": 16, "weight": "bold", **style}),
        TextArea(point.label, textprops={"fontsize": 14, **style}),
    ]
    box = VPacker(children=lines, pad=0, sep=3, align=align)
    box.set_figure(figure)
    return box


def _free_place(
    center: Any, size: Any, taken: Sequence[Bbox], allowed: Bbox, pixels: float
) -> _Place:
    """The nearest place for a label of `size`; all in pixels.

    A place whose leader line would cross another marker or label is the second choice.
    """
    others = [box for box in taken if not box.contains(*center)]
    second = None
    for place in _places(center, size, pixels):
        box = place.box
        inside = (box.p0 >= allowed.p0).all() and (box.p1 <= allowed.p1).all()
        if not inside or box.count_overlaps(taken):
            continue
        if not any(_leader(center, box).intersects_bbox(other) for other in others):
            return place
        second = second or place._replace(cost=place.cost + 1000)
    return second or next(_places(center, size, pixels))._replace(cost=100_000)


def _places(center: Any, size: Any, pixels: float) -> Iterator[_Place]:
    (x, y), (width, height) = center, size
    for distance in range(_MARKER // 2 + 3, 300, 5):
        gap = distance * pixels
        rows = (-0.5 * height, -0.2 * height, -0.8 * height)
        corners = ((gap, gap), (gap, gap / 2), (gap / 2, gap))
        for rank, (dx, dy, align) in enumerate((
            *((gap, row, "left") for row in rows),
            (-width / 2, gap, "center"),
            (-width / 2, -gap - height, "center"),
            *((-gap - width, row, "right") for row in rows),
            *((right, up, "left") for right, up in corners),
            *((right, -down - height, "left") for right, down in corners),
            *((-left - width, up, "right") for left, up in corners),
            *((-left - width, -down - height, "right") for left, down in corners),
        )):  # fmt: skip
            box = Bbox.from_bounds(x + dx, y + dy, width, height)
            yield _Place(box, align, 2 * distance + rank)


def _leader(center: Any, box: Bbox) -> Path:
    return Path([center, np.clip(center, box.p0, box.p1)])


def _image(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # A fixed salt and no date: the same report gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "l2s"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _systems_table(report: Mapping[str, Any]) -> str:
    systems = report["systems"]
    metrics = list(dict.fromkeys(m for s in systems.values() for m in s["quality"]))
    metrics.sort(key=lambda metric: metric != report["task"]["metric"])
    header = (
        "system", "parameters", "read per token", *(_metric_name(m) for m in metrics), "cut",
        "ms per token", "total ms", "speedup",
    )  # fmt: skip
    rows = (
        [
            _name(key), _count(s["params"]), _count(s["params_read_per_token"]),
            *(_number(s["quality"].get(m), ".1f") for m in metrics),
            _number(s["cut_share"], ".1%"), _ms(s["latency"]["decode_ms_per_token"]),
            _ms(s["latency"]["total_ms"]), _speedup(systems, key, "latency"),
        ]
        for key, s in systems.items()
    )  # fmt: skip
    return _table(header, rows)


def _latency_table(systems: Mapping[str, Any], key: str) -> str:
    header = (
        "system", "prompt tokens", "new tokens", "encode ms", "prefill ms", "ms per token",
        "total ms", "speedup", "compile s",
    )  # fmt: skip
    rows = (
        [
            _name(name), str(s[key]["prompt_tokens"]), str(s[key]["new_tokens"]),
            _ms(s[key]["encode_ms"]), _ms(s[key]["prefill_ms"]), _ms(s[key]["decode_ms_per_token"]),
            _ms(s[key]["total_ms"]), _speedup(systems, name, key),
            _number(s[key]["compile_s"], ".1f"),
        ]
        for name, s in systems.items()
    )  # fmt: skip
    return _table(header, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose source is aligned too; all but the first `left` columns align right."""
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
    ratios, metric = report["l2s_vs_llm"], _metric_name(report["task"]["metric"])
    if ratios["quality_ratio"] is None:
        return f"The LLM scores no {metric} for L2S to keep"
    verb = "keeps" if ratios["quality_ratio"] <= 1 else "reaches"
    quality = f"{ratios['quality_ratio']:.1%} of the LLM's {metric}"
    return f"L2S {verb} {quality} at {_factor(ratios['speedup'])}{_TIMES} the speed"


def _conclusion(report: Mapping[str, Any]) -> str:
    metric = report["task"]["metric"]
    llm, slm, l2s, control = (report["systems"][k]["quality"][metric] for k in _SYSTEMS)
    side = "below" if slm <= l2s else "above"
    collapse = "collapses to" if control < l2s / 2 else "does not collapse but reaches"
    return (
        f"{_finding(report)} ({l2s:.1f} against {llm:.1f}); the SLM alone reaches {slm:.1f}, "
        f"{abs(l2s - slm):.1f} points {side} L2S; fed another prompt's representations, "
        f"L2S {collapse} {control:.1f}."
    )


def _name(key: str) -> str:
    return _NAMES.get(key, key)


def _metric_name(metric: str) -> str:
    return _METRIC_NAMES.get(metric, metric)


def _number(value: float | None, spec: str) -> str:
    return _ABSENT if value is None else format(value, spec)


def _speedup(systems: Mapping[str, Any], name: str, latency: str) -> str:
    ratio = systems["llm"][latency]["total_ms"] / systems[name][latency]["total_ms"]
    return f"{_factor(ratio)}{_TIMES}"


def _factor(value: float | None) -> str:
    return _number(value, ".2f" if (value or 0) < 10 else ".1f")


def _ms(value: float | None) -> str:
    size = abs(value or 0)
    return _number(
        value, f",.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3}f"
    )


def _count(value: float) -> str:
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


def _plain(value: Any, where: str) -> Any:
    """The same value in JSON's types; numbers keep their precision, non-finite ones become None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"{where} is {value!r}: expected text, a number, a list or a mapping")


def _check(report: Mapping[str, Any]) -> None:
    _require(report, "report", ("task", "systems", "l2s_vs_llm", "environment"))
    _require(report["environment"], "report.environment", ())
    _require(report["task"], "report.task", _TASK)
    task, metric = report["task"], report["task"]["metric"]
    _require(task["metric_signatures"], "report.task.metric_signatures", ())
    _require_numbers(task, "report.task", ("examples",), ("examples",))
    _require(report["systems"], "report.systems", _SYSTEMS)
    _require(report["l2s_vs_llm"], "report.l2s_vs_llm", _RATIOS)
    _require_numbers(report["l2s_vs_llm"], "report.l2s_vs_llm", _RATIOS)
    counts = ("params", "params_read_per_token")
    for name, system in report["systems"].items():
        where = f"report.systems.{name}"
        _require(system, where, _SYSTEM)
        _require_numbers(system, where, (*counts, "cut_share"), counts)
        _require(system["quality"], f"{where}.quality", (metric,))
        _require_numbers(system["quality"], f"{where}.quality", system["quality"], (metric,))
        for key in ("latency", "latency_batch"):
            _require(system[key], f"{where}.{key}", _LATENCY)
            _require_numbers(system[key], f"{where}.{key}", _LATENCY, ("total_ms",))
            if system[key]["total_ms"] <= 0:
                raise ValueError(
                    f"{where}.{key}.total_ms is {system[key]['total_ms']}: expected more than 0"
                )


def _require(value: Any, where: str, keys: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: expected a mapping")
    for key in keys:
        if key not in value:
            raise ValueError(f"missing key {where}.{key}: present are {', '.join(value) or 'none'}")


def _require_numbers(
    value: Mapping[str, Any], where: str, keys: Iterable[str], finite: Sequence[str] = ()
) -> None:
    for key in keys:
        number = value[key]
        if number is None and key not in finite:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{where}.{key} is {number!r}: expected a finite number")
