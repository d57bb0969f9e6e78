"""The model families: which module a config belongs to.

A module of any family has

    embed(ids [B, T]) -> [B, T, D]
    encode(embedded, mask) -> [B, T, D]              what `score` and `prefill` take
    represent(embedded, mask, layers) -> [B, T, K*D]    H after each of K layers, where the model is
                                                     the LLM; () -> [B, T, D], after all
    score(encoded, mask, response_ids [B, S]) -> [B, S, V]
    prefill(encoded, mask, max_steps) -> (logits [B, V], cache)
    step(token [B], cache) -> (logits [B, V], cache)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn

from l2s_jax.models.gpt2 import GPT2, GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoX, GPTNeoXConfig
from l2s_jax.models.llama import Llama, LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.t5 import T5, T5Config

ModelConfig = T5Config | GPT2Config | GPTNeoXConfig | LlamaConfig

CONFIGS = {"t5": T5Config, "gpt2": GPT2Config, "gpt_neox": GPTNeoXConfig, "llama": LlamaConfig}
_MODULES = {T5Config: T5, GPT2Config: GPT2, GPTNeoXConfig: GPTNeoX, LlamaConfig: Llama}


def make_config(family: str, **geometry: Any) -> ModelConfig:
    """The config of a model that is made here, from config.*.model and the tokenizer's ids.

    The families with rotary positions turn what their first releases do: a quarter of each head in
    GPT-NeoX, all of it in Llama.
    """
    if family not in CONFIGS:
        raise ValueError(f"model family {family!r}: expected one of {', '.join(CONFIGS)}")
    if family == "t5":
        geometry["decoder_start_id"] = geometry["pad_id"]
    elif family == "gpt_neox":
        geometry["rotary"] = Rotary(geometry["width"] // geometry["num_heads"] // 8 * 2)
    elif family == "llama":
        geometry["rotary"] = Rotary(geometry["head_width"])
    return CONFIGS[family](**geometry)


def with_tokens(config: ModelConfig, pad_id: int, eos_id: int, where: str) -> ModelConfig:
    """The config of a model at `where`, with its tokenizer's pad and eos.

    Decoder-only checkpoints often name an eos in config.json and end responses with another: what
    the tokenizer puts at a response's end is what ends it. A T5's never differ, or it is an error.

    Raises:
      ValueError: a T5's pad or eos id is not its tokenizer's.
    """
    if not isinstance(config, T5Config):
        return dataclasses.replace(config, pad_id=pad_id, eos_id=eos_id)
    if (pad_id, eos_id) != (config.pad_id, config.eos_id):
        raise ValueError(
            f"{where}: the model's pad and eos ids are {config.pad_id} and {config.eos_id}, the "
            f"tokenizer's {pad_id} and {eos_id}"
        )
    return config


def check_positions(
    config: ModelConfig, prompt_tokens: int, new_tokens: int, *, where: str, lower: str
) -> None:
    """Raises a ValueError if the model at `where` has no position for all tokens of a row.

    `new_tokens` is 0 where the model only reads prompts. `lower` names what the user can lower.
    """
    longest = prompt_tokens + new_tokens
    positions = getattr(config, "max_positions", longest)
    if longest > positions:
        what = "prompt and response need" if new_tokens else "prompts need"
        raise ValueError(
            f"{where}: the model has {positions} positions, {what} {longest}: lower {lower}"
        )


def make_module(config: ModelConfig) -> nn.Module:
    """The module of a config."""
    return _MODULES[type(config)](config)
