"""What systems have in common: how the modules of models are given the parameters held for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Int32, Key

from l2s_jax.cluster.placement import split_parameters
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.t5 import T5Config
from l2s_jax.models.vocabulary import cut, without_vocabulary

Params = Mapping[str, Any]
Batch = Mapping[str, AnyArray]


def parameter_count(params: Any) -> int:
    """Number of numbers in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def rngs_of(dropout_key: Key[Array, ""] | None) -> dict[str, jax.Array]:
    """What a module draws from; nothing is dropped without a key."""
    return {} if dropout_key is None else {"dropout": dropout_key}


def start_token(
    config: T5Config, rows: int
) -> tuple[Int32[Array, "{rows} 1"], Bool[Array, "{rows} 1"]]:
    """(ids, mask) of what the decoder of an encoder-decoder begins with."""
    ids = jnp.full((rows, 1), config.decoder_start_id, jnp.int32)
    return ids, jnp.ones_like(ids, bool)


def one_by_one(config: ModelConfig) -> ModelConfig:
    """The config of a module that takes layers as they are held, and has no gradient."""
    return dataclasses.replace(config, scan_layers=False, remat=False)


def whole(config: ModelConfig) -> ModelConfig:
    """Likewise, of the module that has the parameters which are trained and saved."""
    return without_vocabulary(one_by_one(config))


def as_trained(params: Params, name: str, config: ModelConfig) -> Params:
    """A system's trained parameters as the module of `config`, called `name`, takes them."""
    params = {**params, name: cut(params[name], config)}
    if not config.scan_layers:
        return params
    return split_parameters(stack_layers(params))


def applied(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """`module.apply` of these parameters."""
    return module.apply({"params": params}, *args, **kwargs)
