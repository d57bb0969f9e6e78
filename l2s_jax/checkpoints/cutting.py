"""Reading a small model that is cut out of a checkpoint: what is not kept is not read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from l2s_jax.checkpoints.engine import Params
from l2s_jax.checkpoints.pretrained import opened
from l2s_jax.checkpoints.reading import read_params
from l2s_jax.models.cutting import cut_config, cut_params, kept_layers, kept_paths
from l2s_jax.settings.cut import Cut


def load_cut(directory: str, cut: Cut, *, dtype: Any = jnp.float32) -> tuple[nn.Module, Params]:
    """(module, params) of what `cut` leaves of the model in a directory.

    As `pretrained.load`: params are float32 numpy arrays, `dtype` that of the module's products.

    Raises:
      ValueError: the directory holds no model, or not what is to be kept.
    """
    with opened(directory) as (family, config, files, entries, shapes, ignored):
        try:
            left = cut_config(config, cut)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        params = read_params(
            files,
            entries,
            shapes,
            ignored=ignored,
            prefixes=kept_paths(list(shapes), kept_layers(config, cut)),
        )
    module = family.make_module(dataclasses.replace(left, dtype=dtype))
    return module, cut_params(params, config, cut)
