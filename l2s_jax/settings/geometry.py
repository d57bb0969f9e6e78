"""Geometries of models that are made here, one class per family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from l2s_jax.settings.declare import Section, setting

FAMILIES = ("t5", "gpt2", "gpt_neox", "llama")


@dataclasses.dataclass(frozen=True)
class Model(Section):
    """Geometry of a model that is made here; the names are those of its family's config class."""

    family: str = setting("t5", "Family of the model.", one_of=FAMILIES)
    width: int = setting(512, "Width of a token's state.", at_least=1)
    num_heads: int = setting(8, "Heads of attention.", at_least=1)
    feed_forward_width: int = setting(2048, "Hidden units of a feed-forward layer.", at_least=1)

    @classmethod
    def kind_of(cls, values: Mapping[str, Any], where: str) -> type[Section]:
        """The class of the family that `values` name."""
        try:
            family = Model(family=values.get("family", "t5")).family
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
        known = [field.name for field in dataclasses.fields(MODELS[family])]
        if others := sorted(values.keys() - set(known)):
            raise ValueError(
                f"{where}.family={family!r} with {', '.join(others)}: expected the settings of "
                f"model_config({family!r}), which are {', '.join(known)}"
            )
        return MODELS[family]

    def whole_heads(self) -> str:
        """What is wrong where heads share the width."""
        if self.width % self.num_heads:
            return f"width={self.width}: expected a multiple of num_heads={self.num_heads}"
        return ""


@dataclasses.dataclass(frozen=True)
class T5Model(Model):
    """Geometry of a T5: encoder and decoder."""

    head_width: int = setting(64, "Width of a head.", at_least=1)
    num_encoder_layers: int = setting(6, "Layers of the encoder.", at_least=1)
    num_decoder_layers: int = setting(6, "Layers of the decoder.", at_least=1)
    activation: str = setting(
        "relu", "Of the feed-forward layers.", one_of=("relu", "gated_gelu", "gated_silu")
    )
    tied_head: bool = setting(True, "Logits come from the token embedding.")
    num_buckets: int = setting(32, "Buckets of relative positions.", at_least=4)
    max_distance: int = setting(128, "From here on, positions share a bucket.", at_least=3)

    def conflict(self) -> str:
        """Distances that have no buckets to share."""
        if self.max_distance <= self.num_buckets // 2:
            return (
                f"max_distance={self.max_distance}: expected more than half of "
                f"num_buckets={self.num_buckets}"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class GPT2Model(Model):
    """Geometry of a GPT-2."""

    family: str = setting("gpt2", "Family of the model.", one_of=FAMILIES)
    num_layers: int = setting(6, "Layers.", at_least=1)
    max_positions: int = setting(1024, "Most tokens of prompt and response.", at_least=1)

    def conflict(self) -> str:
        """Heads that don't divide the width."""
        return self.whole_heads()


@dataclasses.dataclass(frozen=True)
class GPTNeoXModel(Model):
    """Geometry of a GPT-NeoX; a quarter of each head turns, as in Pythia."""

    family: str = setting("gpt_neox", "Family of the model.", one_of=FAMILIES)
    num_layers: int = setting(6, "Layers.", at_least=1)

    def conflict(self) -> str:
        """Heads that don't divide the width, or of which no quarter can turn."""
        if self.width // self.num_heads < 8:
            return f"width={self.width}: expected at least 8 for each of num_heads={self.num_heads}"
        return self.whole_heads()


@dataclasses.dataclass(frozen=True)
class LlamaModel(Model):
    """Geometry of a Llama; all of each head turns."""

    family: str = setting("llama", "Family of the model.", one_of=FAMILIES)
    num_layers: int = setting(6, "Layers.", at_least=1)
    num_kv_heads: int = setting(8, "Heads of keys and values.", at_least=1)
    head_width: int = setting(
        64,
        "Width of a head.",
        fits=lambda width: width >= 2 and width % 2 == 0,
        expected="an even integer >= 2",
    )
    tied_head: bool = setting(True, "Logits come from the token embedding.")

    def conflict(self) -> str:
        """Heads that cannot share keys and values."""
        if self.num_heads % self.num_kv_heads:
            return (
                f"num_heads={self.num_heads}: expected a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        return ""


MODELS: dict[str, type[Model]] = {
    "t5": T5Model,
    "gpt2": GPT2Model,
    "gpt_neox": GPTNeoXModel,
    "llama": LlamaModel,
}
