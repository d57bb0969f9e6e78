"""What encodes, of a whole model that is in memory: the same arrays, so that it is there once."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from l2s_jax.checkpoints.configs import family_of
from l2s_jax.checkpoints.engine import Params
from l2s_jax.checkpoints.pretrained import abstract_encoder
from l2s_jax.models.serving import float_dtype
from l2s_jax.models.stacking import stacked_path


def encoder_part(config: Any, params: Params) -> Params:
    """What encodes of a whole model's parameters, the same arrays, as `load_encoder` reads it.

    `config` is of the encoder, as `load_encoder` gives it.
    """
    _, prefixes = family_of(config).encoder_parameters(config, 0)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if path.startswith(prefixes)}
    return unflatten_dict(kept, sep="/")


def encoder_held(config: Any, params: Params) -> tuple[Params, list[str]]:
    """What a whole model holds of what `load_encoder` reads, and the entries that it does not hold.

    It does not where shapes or dtypes differ: half of the layers are no part of a stack of all.
    `config` is of the encoder, as `load_encoder` gives it; both models are in float.
    """
    _, prefixes = family_of(config).encoder_parameters(config, 0)
    entries = {
        entry: stacked_path(entry)[0] if config.scan_layers else entry
        for entry in (prefix.rstrip("/") for prefix in prefixes)
    }
    wanted: dict[str, Any] = flatten_dict(abstract_encoder(config)[1], sep="/")
    there: dict[str, Any] = flatten_dict(params, sep="/")
    other = {
        path.split("/")[0]
        for path, leaf in wanted.items()
        if path not in there
        or there[path].shape != leaf.shape
        or there[path].dtype != float_dtype(path, config, encodes=True)
    }
    held = {path: there[path] for path in wanted if path.split("/")[0] not in other}
    left = [entry for entry, name in entries.items() if name in other]
    return unflatten_dict(held, sep="/"), left
