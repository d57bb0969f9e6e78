"""A scatter plot of many systems: each point has a number, which a list beside it explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 10.0, 5.625  # inches, of a slide
_ROW = 0.27  # inches, of a line of the list
_LIST_LEFT = 0.58


class Numbered(NamedTuple):
    """One system; `spread` is half the length of its error bar, `key` the gid of its marker."""

    key: str
    name: str
    label: str
    x: float
    y: float
    spread: float
    color: str


def scatter(
    points: Sequence[Numbered], *, title: str, subtitle: str, x_label: str, y_label: str
) -> Figure:
    """Points in the order of their numbers, from 1; later ones lie above earlier ones.

    The axes fit the points: neither begins at 0.
    """
    height = max(_HEIGHT, 1.6 + _ROW * len(points))
    figure = Figure(figsize=(_WIDTH, height), dpi=200, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    bottom, top = 0.76 / height, 1 - 1.07 / height
    axes = figure.add_axes((0.1, bottom, _LIST_LEFT - 0.125, top - bottom))
    for number, p in enumerate(points, 1):
        if p.spread:
            axes.errorbar(p.x, p.y, yerr=p.spread, color=p.color, capsize=4, elinewidth=1.5)
        (marker,) = axes.plot(p.x, p.y, "o", markersize=12, color=p.color, markeredgecolor="white")
        marker.set_gid(p.key)
        marker.set_zorder(2 + number)
        axes.annotate(
            str(number), (p.x, p.y), color="white", fontsize=7, weight="bold", ha="center",
            va="center_baseline", zorder=2 + number,
        )  # fmt: skip
    axes.margins(0.12)
    axes.set_xlabel(x_label, fontsize=13, color="#444444", labelpad=6)
    axes.set_ylabel(y_label, fontsize=13, color="#444444", labelpad=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(labelsize=11, color="#999999", labelcolor="#444444")
    _write(figure, renderer, 0.02, [(title, "black")], 1 - 0.45 / height, 18, weight="bold")
    _write(figure, renderer, 0.02, [(subtitle, "#666666")], 1 - 0.79 / height, 12)
    texts = [(f"{i}  {p.name}: {p.label}", p.color) for i, p in enumerate(points, 1)]
    _write(figure, renderer, _LIST_LEFT, texts, top - _ROW / height, 11)
    return figure


def _write(
    figure: Figure,
    renderer: Any,
    left: float,
    texts: Sequence[tuple[str, str]],
    top: float,
    size: float,
    **style: Any,
) -> None:
    """Lines of (text, color), all of the same size, as small as the longest of them needs."""
    row = _ROW / figure.get_figheight()
    lines = [
        figure.text(
            left, top - i * row, text, fontsize=size, color=color, parse_math=False, **style
        )
        for i, (text, color) in enumerate(texts)
    ]
    longest = max(line.get_window_extent(renderer).width for line in lines)
    excess = longest / ((0.985 - left) * figure.bbox.width)
    for line in lines:
        line.set_fontsize(size / max(1.0, excess))
