"""Draws the method: docs/method.svg.

python docs/method.py
"""

import pathlib

WIDTH, HEIGHT = 960, 400
FROZEN, TRAINED, PLAIN = "#dbe7f6", "#d9efdc", "#f4f4f4"
INK, QUIET = "#1f2933", "#52606d"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """A rounded box with centred lines; the first is bold, the others are small."""
    middle = x + width / 2
    top = y + height / 2 - 10 * (len(lines) - 1)
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" '
        f'stroke="{INK}" stroke-width="1.2"/>'
    ]
    for number, line in enumerate(lines):
        parts.append(text(middle, top + 20 * number + 5, line, bold=not number))
    return "\n".join(parts)


def text(x: float, y: float, line: str, *, bold: bool = False, anchor: str = "middle") -> str:
    """One line of text."""
    size, weight, colour = (17, 600, INK) if bold else (14, 400, QUIET)
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{line}</text>'
    )


def arrow(*points: tuple[int, int]) -> str:
    """A line through points, with its head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )


def bracket(x: int, end: int, y: int, line: str) -> str:
    """A bracket below what happens how often."""
    path = f"M{x},{y} v8 H{end} v-8"
    return (
        f'<path d="{path}" fill="none" stroke="{QUIET}" stroke-width="1.2"/>\n'
        f"{text((x + end) / 2, y + 28, line)}"
    )


def drawing() -> str:
    """The SVG."""
    parts = [
        box(20, 150, 120, 70, PLAIN, "prompt", "T tokens"),
        box(210, 30, 210, 150, FROZEN, "LLM", "large, frozen", "reads all tokens at once"),
        box(500, 70, 120, 70, TRAINED, "projector", "trained"),
        box(210, 235, 210, 70, TRAINED, "SLM's embedding", "of the same tokens"),
        box(720, 130, 210, 80, TRAINED, "SLM", "small, trained"),
        box(720, 255, 210, 50, PLAIN, "response"),
        f'<circle cx="660" cy="170" r="14" fill="white" stroke="{INK}" stroke-width="1.6"/>',
        f'<path d="M652,170 H668 M660,162 V178" stroke="{INK}" stroke-width="1.8"/>',
        arrow((140, 170), (175, 170), (175, 105), (208, 105)),
        arrow((140, 200), (175, 200), (175, 270), (208, 270)),
        arrow((420, 105), (498, 105)),
        text(459, 97, "H"),
        arrow((620, 105), (660, 105), (660, 154)),
        text(676, 110, "Z", anchor="start"),
        arrow((420, 270), (660, 270), (660, 186)),
        text(459, 262, "E"),
        arrow((674, 170), (718, 170)),
        arrow((780, 210), (780, 253)),
        arrow((832, 255), (832, 212)),
        text(844, 237, "each token", anchor="start"),
        bracket(20, 680, 325, "once for each prompt, all tokens in parallel"),
        bracket(720, 930, 325, "once for each new token"),
    ]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>LLM-to-SLM: a large frozen model reads the prompt once, a small model writes the response</title>
<defs>
<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L10,5 L0,10 z" fill="{INK}"/>
</marker>
</defs>
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<g font-family="system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif">
{chr(10).join(parts)}
</g>
</svg>
"""  # noqa: E501  (lines of SVG)


if __name__ == "__main__":
    target = pathlib.Path(__file__).parent / "method.svg"
    target.write_text(drawing(), encoding="utf-8")
