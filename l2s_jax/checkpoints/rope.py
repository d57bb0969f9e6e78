"""Rotary positions in a config.json, as transformers 4 and 5 write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from l2s_jax.checkpoints.fields import read_integer, read_positive
from l2s_jax.messages import shown
from l2s_jax.models.rotary import KINDS, Rotary


def read_rotary(
    fields: Mapping[str, Any],
    head_width: int,
    source: str,
    *,
    theta_field: str = "rope_theta",
    share_field: str = "partial_rotary_factor",
    default_share: float = 1.0,
) -> Rotary:
    """The Rotary of a config.json's fields; a kind that isn't one of KINDS is an error."""
    # transformers lets the older field win where a file has both.
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise ValueError(
            f"{source}: rope_parameters is {shown(given)}, expected one set for all layers"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(
            f"{source}: rope_type is {shown(kind)}, which is not supported; expected one of {KINDS}"
        )
    merged = {"rope_theta": fields.get(theta_field), "share": fields.get(share_field)}
    merged = {name: value for name, value in merged.items() if value is not None} | dict(given)
    merged.setdefault("share", merged.get("partial_rotary_factor", default_share))
    share = read_positive(merged, "share", default_share, source)
    if share > 1:
        raise ValueError(f"{source}: {share_field} is {share}, expected at most 1")
    rotary = {
        "width": int(head_width * share),
        "base": read_positive(merged, "rope_theta", 10000.0, source),
        "kind": kind,
    }
    if kind == "default":
        return Rotary(**rotary)
    rotary["factor"] = read_positive(merged, "factor", None, source)
    if kind == "linear":
        return Rotary(**rotary)
    original = "original_max_position_embeddings"
    if fields.get(original) is not None:
        merged[original] = fields[original]
    merged.setdefault(original, fields.get("max_position_embeddings"))
    rotary["original_length"] = read_integer(merged, original, None, source)
    if kind == "llama3":
        return Rotary(
            **rotary,
            low_frequency_factor=read_positive(merged, "low_freq_factor", None, source),
            high_frequency_factor=read_positive(merged, "high_freq_factor", None, source),
        )
    if merged.get("truncate", True) is not True:
        raise ValueError(
            f"{source}: truncate is {shown(merged['truncate'])}, which is not supported"
        )
    return Rotary(
        **rotary,
        beta_fast=_optional(merged, "beta_fast", source) or 32.0,
        beta_slow=_optional(merged, "beta_slow", source) or 1.0,
        attention_factor=_attention_factor(merged, rotary["factor"], source),
    )


def _optional(given: Mapping[str, Any], name: str, source: str) -> float | None:
    """A number above 0, or None where there is none."""
    return read_positive(given, name, None, source) if given.get(name) else None


def _attention_factor(given: Mapping[str, Any], factor: float, source: str) -> float:
    """How much YaRN scales queries and keys, by the paper's fit where the file doesn't say."""
    if given.get("attention_factor") is not None:
        return read_positive(given, "attention_factor", None, source)

    def fit(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, overall = (_optional(given, name, source) for name in ("mscale", "mscale_all_dim"))
    if scale and overall:
        return fit(scale) / fit(overall)
    return fit(1.0)


def write_rotary(rotary: Rotary) -> dict[str, Any]:
    """The rope_parameters of a config.json, without the rotated share."""
    given: dict[str, Any] = {"rope_type": rotary.kind, "rope_theta": rotary.base}
    if rotary.kind != "default":
        given["factor"] = rotary.factor
    if rotary.kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = rotary.original_length
    if rotary.kind == "llama3":
        given["low_freq_factor"] = rotary.low_frequency_factor
        given["high_freq_factor"] = rotary.high_frequency_factor
    if rotary.kind == "yarn":
        given["beta_fast"], given["beta_slow"] = rotary.beta_fast, rotary.beta_slow
        given["attention_factor"] = rotary.attention_factor
    return given
