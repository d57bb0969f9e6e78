"""A labelled scatter plot that can go on a slide: one point per system, each with its name."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
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

_MARKER = 18  # points across, the air around it included
_LOG_RANGE = 12.0


class Point(NamedTuple):
    """One system; `key` becomes the gid of its label's artist."""

    key: str
    name: str
    label: str
    x: float
    y: float
    color: str
    hollow: bool


def scatter(
    points: Sequence[Point], *, title: str, subtitle: str, x_label: str, y_label: str
) -> Figure:
    """Points labelled in place of a legend; no label overlaps a marker or another label.

    The y axis begins at 0; the x axis is logarithmic where x spans more than a factor of 12.
    """
    figure = Figure(figsize=(10, 5.625), dpi=200, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.135, 0.885, 0.675))
    _style_axes(axes, points)
    axes.set_xlabel(x_label, fontsize=15, color="#444444", labelpad=8)
    axes.set_ylabel(y_label, fontsize=15, color="#444444", labelpad=8)
    for point in points:
        axes.plot(
            point.x, point.y, "o", markersize=_MARKER - 4, color=point.color,
            markerfacecolor="white" if point.hollow else point.color, markeredgewidth=2.5,
            clip_on=False,
        )  # fmt: skip
    write_title(figure, title, subtitle, canvas.get_renderer())
    place_labels(axes, points, canvas.get_renderer())
    return figure


def _style_axes(axes: Axes, points: Sequence[Point]) -> None:
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


def write_title(
    figure: Figure,
    title: str,
    subtitle: str,
    renderer: Any,
    heights: tuple[float, float] = (0.915, 0.855),
) -> None:
    """Writes both lines at these heights, as small as the figure's width needs."""
    style: dict[str, Any] = {"x": 0.02, "ha": "left", "va": "baseline", "parse_math": False}
    lines = (
        figure.text(y=heights[0], s=title, fontsize=20, weight="bold", **style),
        figure.text(y=heights[1], s=subtitle, fontsize=14, color="#666666", **style),
    )
    for line in lines:
        excess = line.get_window_extent(renderer).width / (0.96 * figure.bbox.width)
        line.set_fontsize(float(line.get_fontsize()) / max(1.0, excess))


def place_labels(
    axes: Axes, points: Sequence[Point], renderer: Any, *, sizes: tuple[float, float] = (16, 14)
) -> None:
    """Puts the labels near their points, where they overlap no marker and no other label.

    `sizes` are those of names and of what is below them, in points; an empty label has no line.
    """
    figure: Any = axes.figure
    pixels = figure.dpi / 72
    centers = axes.transData.transform([(p.x, p.y) for p in points])
    extents = [_label(p, "left", figure, sizes).get_bbox(renderer).size for p in points]
    left, bottom, _, top = axes.bbox.extents
    allowed = Bbox.from_extents(left, bottom, figure.bbox.x1, top).padded(-3 * pixels)
    # Who is placed first decides who must move away: take the order that suits all best.
    orders = itertools.islice(itertools.permutations(range(len(points))), 24)
    plans = (_arrange(order, centers, extents, allowed, pixels) for order in orders)
    for index, place in min(plans, key=lambda plan: sum(p.cost for p in plan.values())).items():
        point, center = points[index], centers[index]
        leader = _leader(center, place.box)
        if np.ptp(leader.vertices, axis=0).max() > 1.5 * _MARKER * pixels:
            ends = axes.transData.inverted().transform(leader.vertices)
            axes.plot(*ends.T, color=point.color, linewidth=1, alpha=0.6, zorder=1, clip_on=False)
        artist = AnnotationBbox(
            _label(point, place.align, figure, sizes), (point.x, point.y),
            xybox=tuple((place.box.p0 - center) / pixels), boxcoords="offset points",
            box_alignment=(0, 0), frameon=False, pad=0, annotation_clip=False,
        )  # fmt: skip
        artist.set_gid(point.key)
        axes.add_artist(artist)


class _Place(NamedTuple):
    box: Bbox
    align: Any  # of the lines: left, center or right
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


def _label(point: Point, align: Any, figure: Figure, sizes: tuple[float, float]) -> VPacker:
    style: dict[str, Any] = {"color": point.color, "parse_math": False}
    name, below = sizes
    lines: list[Any] = [
        TextArea(point.name, textprops={"fontsize": name, "weight": "bold", **style})
    ]
    if point.label:
        lines.append(TextArea(point.label, textprops={"fontsize": below, **style}))
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
        inside = np.all(box.p0 >= allowed.p0) and np.all(box.p1 <= allowed.p1)
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


def image(figure: Figure, kind: str) -> bytes:
    """The bytes of a `kind` file, "png" or "svg"."""
    buffer = io.BytesIO()
    # A fixed salt and no date: the same report gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "l2s"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
