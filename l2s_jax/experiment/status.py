"""`--mode=status`: which stages are done, which are not and why, from what is on disk."""

from __future__ import annotations

from collections.abc import Sequence

from l2s_jax.experiment.stage import Stage


def status(stages: Sequence[Stage]) -> str:
    """A line for each stage that is used: name, state, more about it, and what it is made from."""
    used = [stage for stage in stages if stage.is_used()]
    rows = []
    for stage in used:
        state, more = stage.state()
        needs = ", ".join(need.name for need in stage.needs if need.is_used())
        rows.append((stage.name, state, more, f"<- {needs}" if needs else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
