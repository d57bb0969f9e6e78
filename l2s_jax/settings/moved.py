"""Keys that have moved: what to say of the old ones, and how an old config.json is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Old key -> new key.
MOVED = {"labels": "labels.source"}


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json, of whatever version wrote it, under the keys of this one."""
    config = dict(values)
    for upgrade in _UPGRADES:
        upgrade(config)
    return config


def _labels_section(config: dict[str, Any]) -> None:
    """The LLM's responses were made with the settings of decoding, on the same mesh."""
    source = config.get("labels")
    if not isinstance(source, str):
        return
    config["labels"] = {"source": source}
    if source == "llm":
        names = ("search", "max_new_tokens", "batch_size")
        decoding = config.get("decoding")
        decoding = decoding if isinstance(decoding, Mapping) else {}
        config["labels"] |= {n: v for n, v in decoding.items() if n in names}


_UPGRADES: tuple[Callable[[dict[str, Any]], None], ...] = (_labels_section,)
