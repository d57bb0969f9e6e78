"""What the site's build adds: the tables of all settings, in configuration.md.

python docs/hooks.py prints these tables.
"""

from __future__ import annotations

from typing import Any

from l2s_jax.settings.describe import describe

MARK = "<!-- settings -->"


def tables() -> str:
    """A table for each section, below the section's name."""
    sections: dict[str, list[str]] = {}
    for key in describe():
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


if __name__ == "__main__":
    print(tables())
