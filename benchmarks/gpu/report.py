"""gpu.md, of the tables that the parts left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from l2s_jax.files import write_bytes


def write(parts: Mapping[str, Mapping[str, Any]], rehearsal: bool, folder: str) -> None:
    """Replaces FOLDER/gpu.md."""
    content = markdown(parts, rehearsal, folder).encode()
    write_bytes(os.path.join(folder, "gpu.md"), content)


def markdown(parts: Mapping[str, Mapping[str, Any]], rehearsal: bool, folder: str) -> str:
    """A section per part: how it ended, its tables, its plot in the folder, what it skipped."""
    device = parts.get("facts", {}).get("result", {}).get("device") or "an unknown device"
    lines = [f"# On {device}", ""]
    if rehearsal:
        lines += ["A rehearsal with tiny models: these figures say nothing of any machine.", ""]
    lines += ["| part | | seconds |", "|---|---|---:|"]
    lines += [f"| {name} | {p['status']} | {p['seconds']:.0f} |" for name, p in parts.items()]
    for name, entry in parts.items():
        result = entry.get("result", {})
        lines += ["", f"## {name}"]
        if entry["status"] != "ok":
            lines += ["", f"{entry['status'][0].upper()}{entry['status'][1:]}."]
        for table in result.get("tables", ()):
            lines += _table(table)
        if os.path.exists(os.path.join(folder, f"{name}.png")):
            lines += ["", f"![{name}]({name}.png)"]
        if skipped := result.get("skipped"):
            lines += ["", "Not measured:", ""]
            lines += [f"- {what}: {why}" for what, why in skipped.items()]
    return "\n".join(lines) + "\n"


def _table(table: Mapping[str, Any]) -> list[str]:
    lines = ["", f"### {table['title']}", ""]
    if table["note"]:
        lines += [table["note"], ""]
    numbers = [
        all(isinstance(row[i], (int, float, type(None))) for row in table["rows"])
        for i in range(len(table["columns"]))
    ]
    lines.append("| " + " | ".join(table["columns"]) + " |")
    lines.append("|" + "|".join("---:" if number else "---" for number in numbers) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table["rows"]]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
