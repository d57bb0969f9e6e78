"""What the site's build adds: the tables of all settings, in configuration.md."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MARK = "<!-- settings -->"
CONFIG = pathlib.Path(__file__).parent.parent / "l2s_jax" / "config.py"


class Key(NamedTuple):
    """One setting, as in --config.KEY."""

    key: str
    type: str
    default: Any
    allowed: str
    meaning: str


def keys() -> list[Key]:
    """Every setting, in the order of the config."""
    from l2s_jax.config import default

    comments = dict(re.findall(r'^ +"(\w+)": .*,  # (.*)$', CONFIG.read_text(), re.MULTILINE))
    return [
        Key(path, type(value).__name__, value, "", comments.get(path.split(".")[-1], ""))
        for path, value in _leaves(default().to_dict())
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def tables() -> str:
    """A table for each section, below the section's name."""
    sections: dict[str, list[str]] = {}
    for key in keys():
        section, _, name = key.key.rpartition(".")
        cells = (f"`{name}`", f"`{key.type}`", f"`{key.default!r}`", key.allowed, key.meaning)
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        sections.setdefault(section, []).append(f"| {row} |")
    parts = []
    for section, rows in sections.items():
        parts += [f"### {f'`{section}`' if section else 'Of the whole experiment'}", ""]
        parts += [
            "| key | type | default | allowed | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(parts)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    if page.file.src_uri != "configuration.md":
        return markdown
    if markdown.count(MARK) != 1:
        raise ValueError(f"configuration.md: expected {MARK} once, where the tables go")
    return markdown.replace(MARK, tables())
