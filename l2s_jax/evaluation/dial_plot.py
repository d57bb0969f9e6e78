"""The dial's plot: quality above, likeness to the LLM's text below, both against time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from l2s_jax.evaluation import plot

_LINE, _END, _EQUAL, _GRAY = "#2f7d32", "#333333", "#0b62a4", "#999999"


class Dialled(NamedTuple):
    """One point: `time` in ms, `chrf` and `equal` from 0 to 100; an end has no tolerance."""

    name: str
    is_end: bool
    time: float
    quality: float
    chrf: float
    equal: float


def panels(
    points: Sequence[Dialled],
    *,
    title: str,
    subtitle: str,
    quality: str,
    kept: float | None,
    kept_label: str,
) -> Figure:
    """Two panels on one axis of time, the points labelled by their names.

    `quality` is what the upper one shows. A line there marks `kept`, if it is a number.
    """
    figure = Figure(figsize=(10, 8.5), dpi=200, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    upper = figure.add_axes((0.095, 0.455, 0.88, 0.425))
    lower = figure.add_axes((0.095, 0.085, 0.88, 0.315), sharex=upper)
    longest = max(point.time for point in points)
    upper.set_xlim(0, 1.12 * longest)
    _style(upper, quality)
    _style(lower, "likeness to the LLM's text (%)")
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("time per request at batch 1 (ms)", fontsize=13, color="#444444", labelpad=6)
    _draw_quality(upper, points, kept, kept_label)
    _draw_likeness(lower, points)
    plot.write_title(figure, title, subtitle, renderer, (0.945, 0.908))
    plot.place_labels(
        upper,
        [
            plot.Point(p.name, p.name, "", p.time, p.quality, _END if p.is_end else _LINE, False)
            for p in points
        ],
        renderer,
        sizes=(13, 11),
    )
    return figure


def _draw_quality(
    axes: Axes, points: Sequence[Dialled], kept: float | None, kept_label: str
) -> None:
    drafted = [p for p in points if not p.is_end]
    axes.plot([p.time for p in drafted], [p.quality for p in drafted], color=_LINE, alpha=0.35)
    for p in points:
        color = _END if p.is_end else _LINE
        (marker,) = axes.plot(
            p.time, p.quality, "s" if p.is_end else "o", markersize=9, color=color, clip_on=False
        )
        marker.set_gid(f"point {p.name}")
    values = [p.quality for p in points] + ([] if kept is None else [kept])
    room = max(max(values) - min(values), 0.02 * max(map(abs, values)), 0.5)
    axes.set_ylim(min(values) - 0.2 * room, max(values) + 0.25 * room)
    if kept is not None:
        axes.axhline(kept, color=_GRAY, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            kept_label, (0.0, kept), xycoords=("axes fraction", "data"), xytext=(5, 4),
            textcoords="offset points", fontsize=11, color="#666666",
        )  # fmt: skip


def _draw_likeness(axes: Axes, points: Sequence[Dialled]) -> None:
    axes.set_ylim(-17, 112)
    axes.set_yticks(range(0, 101, 20))
    for name, color, values, above in (
        ("chrF", _LINE, [p.chrf for p in points], 8),
        ("equal texts", _EQUAL, [p.equal for p in points], -19),
    ):
        drafted = [(p.time, v) for p, v in zip(points, values, strict=True) if not p.is_end]
        axes.plot(*zip(*drafted, strict=True), color=color, alpha=0.35)
        for p, value in zip(points, values, strict=True):
            shape = "s" if p.is_end else "o"
            axes.plot(p.time, value, shape, markersize=8, color=color, clip_on=False)
        least = min(range(len(points)), key=lambda i: points[i].time)
        axes.annotate(
            name, (points[least].time, values[least]), xytext=(-4, above),
            textcoords="offset points", fontsize=12, weight="bold", color=color,
        )  # fmt: skip


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=13, color="#444444", labelpad=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRAY)
    axes.tick_params(labelsize=12, color=_GRAY, labelcolor="#444444")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
