"""Where a run can be followed from, beside its own files."""

from __future__ import annotations

from typing import Any

# With the extra of the package that it needs, which bears its name; "" for none.
TRACKERS = {"tensorboard": "", "wandb": "wandb", "trackio": "trackio"}


def are_trackers(names: tuple[Any, ...]) -> bool:
    """Whether all are TRACKERS, each once.

    Raises:
      ValueError: one is not.
    """
    for name in names:
        if not isinstance(name, str) or name not in TRACKERS:
            raise ValueError(f"there is no {name!r}")
    return len(set(names)) == len(names)
