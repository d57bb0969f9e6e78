"""What a report says of logit distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clause(task: Mapping[str, Any]) -> str:
    """The end of a sentence about what the SLM was trained on; "" without distillation."""
    return _on_labels(task.get("distillation")) + _on_policy(task.get("on_policy"))


def _on_policy(share: float | None) -> str:
    if not share:
        return ""
    return f", and for {share:.0%} of the batches on the LLM's distributions over its own responses"


def _on_labels(settings: Mapping[str, Any] | None) -> str:
    if not settings:
        return ""
    kept = f"the {settings['top_k']} likeliest tokens"
    if left_out := settings["left_out"]:
        kept += (
            f", which leave out {_share(left_out['mean'])} of its probability "
            f"({_share(left_out['p99'])} at the 99th percentile)"
        )
    return (
        f" and, for {settings['weight']:.0%} of the loss, on the LLM's distributions over their "
        f"tokens at temperature {settings['temperature']:g} ({kept})"
    )


def _share(value: float) -> str:
    return f"{100 * value:.2g}%"
