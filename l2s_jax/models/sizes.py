"""What numbers a model's config may hold: the one place where they are bounded.

A config comes of a file that anyone may have written, and programs and tables are made by it before
a weight is looked at.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

_INT = 2**31 - 1
# At least, and at most: several times what any model has.
_RANGES = {
    "vocab_size": (1, 2**26),
    "width": (1, 2**20),
    "num_heads": (1, 2**16),
    "num_kv_heads": (1, 2**16),
    "head_width": (1, 2**16),
    "feed_forward_width": (1, 2**22),
    "num_layers": (1, 10_000),
    "num_encoder_layers": (1, 10_000),
    "num_decoder_layers": (1, 10_000),
    "num_buckets": (4, 2**16),
    "max_distance": (1, 2**20),
    "max_positions": (1, 2**26),
    "sliding_window": (0, _INT),
    "trained_positions": (0, _INT),
}
_IDS = ("pad_id", "eos_id", "decoder_start_id")
_SHARES = ("norm_epsilon", "dropout_rate")


def check_sizes(config: Any) -> None:
    """Checks the numbers of a model's config, a dataclass of any family.

    Raises:
      ValueError: one that no model has.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in _RANGES:
            low, high = _RANGES[name]
            if not low <= value <= high:
                raise ValueError(f"{name} {value}: expected {low} to {high}")
        elif name in _SHARES and not 0 <= value < 1:
            raise ValueError(f"{name} {value}: expected a number in [0, 1)")


def check_ids(config: Any) -> None:
    """Checks that the special ids of a model's config are among those of its vocabulary.

    Raises:
      ValueError: one is not.
    """
    for name in _IDS:
        id = getattr(config, name, 0)
        if not 0 <= id < config.vocab_size:
            raise ValueError(f"{name} {id}: expected 0 to {config.vocab_size - 1}")


def check_finite(config: Any, *names: str) -> None:
    """Checks that fields of a dataclass are finite numbers above 0.

    Raises:
      ValueError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        # Compared with a float's largest: a whole number may be larger than any float.
        if not 0 < value <= 3.4e38 or not math.isfinite(value):
            raise ValueError(f"{name} {value}: expected a finite number above 0")
