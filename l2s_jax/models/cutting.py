"""A small model cut out of a large one: some of its layers, and of each the largest units.

What is left is an ordinary model of its family, in its own order. Layers that are kept evenly
spaced, the first and the last among them, are what Shleifer and Rush 2020 (arXiv 2010.13002) start
a student from. Units are chosen by magnitude, as in Muralidharan et al. 2024 (arXiv 2407.14679),
but by that of their weights, so that no data are needed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from l2s_jax.models.families import ModelConfig
from l2s_jax.models.t5 import T5Config
from l2s_jax.settings.cut import STACKS, Cut

_LAYER = re.compile(r"(.*?)layers_(\d+)/(.*)")


def kept_layers(config: ModelConfig, cut: Cut) -> dict[str, tuple[int, ...]]:
    """{stack of layers, as a prefix of paths: which of its layers are kept}.

    Raises:
      ValueError: a layer or more layers than there are, or settings of another kind of model.
    """
    stacks = ("encoder_", "decoder_") if isinstance(config, T5Config) else ("",)
    kept = {}
    for stack in STACKS:
        count, layers = getattr(cut, f"num_{stack}layers"), getattr(cut, f"{stack}layers")
        if stack not in stacks:
            if name := f"num_{stack}layers" if count else f"{stack}layers" if layers else "":
                there = " and ".join(f"num_{other}layers" for other in stacks)
                raise ValueError(f"{name}: the model has no such layers, expected {there}")
            continue
        total = getattr(config, f"num_{stack}layers")
        if count > total:
            raise ValueError(f"num_{stack}layers={count}: expected at most {total}, the model's")
        if layers and layers[-1] >= total:
            raise ValueError(
                f"{stack}layers={layers}: the model has no layer {layers[-1]}, expected 0 to "
                f"{total - 1}"
            )
        spaced = np.linspace(0, total - 1, count or total).round().astype(int)
        kept[stack.replace("_", "/")] = layers or tuple(spaced.tolist())
    if cut.feed_forward_width > config.feed_forward_width:
        raise ValueError(
            f"feed_forward_width={cut.feed_forward_width}: expected at most "
            f"{config.feed_forward_width}, the model's"
        )
    return kept


def cut_config(config: ModelConfig, cut: Cut) -> ModelConfig:
    """The config of what is left of a model; errors as of `kept_layers`."""
    changes: dict[str, Any] = {}
    for stack, layers in kept_layers(config, cut).items():
        changes[f"num_{stack.replace('/', '_')}layers"] = len(layers)
        if pattern := getattr(config, "window_pattern", ""):
            changes["window_pattern"] = "".join(pattern[layer] for layer in layers)
    if cut.feed_forward_width:
        changes["feed_forward_width"] = cut.feed_forward_width
    return dataclasses.replace(config, **changes)


def cut_as_set(config: ModelConfig, cut: Cut) -> ModelConfig:
    """As `cut_config`, of a cut that config.slm.cut sets, which errors name."""
    try:
        return cut_config(config, cut)
    except ValueError as error:
        raise ValueError(f"config.slm.cut.{error}") from None


def kept_paths(paths: Sequence[str], layers: Mapping[str, Sequence[int]]) -> list[str]:
    """The '/'-joined paths of parameters that are kept, layers as `kept_layers` gives them."""
    found = [(path, _LAYER.fullmatch(path)) for path in paths]
    return [path for path, match in found if not match or int(match[2]) in layers[match[1]]]


def cut_params(params: Mapping[str, Any], config: ModelConfig, cut: Cut) -> dict[str, Any]:
    """What is left of a model's parameters; those of layers that are not kept may be missing.

    Args:
      params: numpy arrays.
      config: of the whole model.
      cut: what is kept.
    """
    layers = kept_layers(config, cut)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    new = {}
    for path in kept_paths(list(flat), layers):
        if match := _LAYER.fullmatch(path):
            stack, layer, rest = match[1], int(match[2]), match[3]
            new[f"{stack}layers_{layers[stack].index(layer)}/{rest}"] = flat[path]
        else:
            new[path] = flat[path]
    if cut.feed_forward_width:
        _narrow(new, cut.feed_forward_width)
    return unflatten_dict(new, sep="/")


def _narrow(flat: dict[str, Any], width: int) -> None:
    """Leaves the `width` units of each feed-forward whose weights' norms have the largest product.

    Unit j is column j of the matrices inward and row j of the one outward.
    """
    for outward in [path for path in flat if path.endswith("feed_forward/wo/kernel")]:
        start = outward.removesuffix("wo/kernel")
        inward = [path for path in flat if re.fullmatch(f"{start}wi(_gate)?/kernel", path)]
        size = np.linalg.norm(flat[outward], axis=1)
        for path in inward:
            size = size * np.linalg.norm(flat[path], axis=0)
        units = np.sort(np.argsort(-size, kind="stable")[:width])
        flat[outward] = flat[outward][units]
        for path in inward:
            flat[path] = flat[path][:, units]
            bias = path.replace("/kernel", "/bias")
            if bias in flat:
                flat[bias] = flat[bias][units]
