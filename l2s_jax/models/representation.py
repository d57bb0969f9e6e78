"""H: what the frozen LLM makes of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float32, Int

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.families import ModelConfig, make_module


def represent(
    config: ModelConfig,
    frozen: Mapping[str, Any],
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    layers: tuple[int, ...] = (),
) -> Float32[Array, "B T KD"]:
    """H of prompts, by an LLM of which `frozen` is what encodes.

    After all its layers, or after each of so many, side by side.
    """
    llm: Any = make_module(config)
    embedded = llm.apply({"params": frozen}, ids, method="embed")
    return llm.apply({"params": frozen}, embedded, mask, layers, method="represent")
