"""Optimizers and learning-rate schedules, from optax, by the values of a training config.

Patterns (`trainable`, `learning_rate_scales`) are regular expressions that have to match the whole
'/'-joined path of a parameter in the tree that is trained.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from l2s_jax.cluster.paths import compiled, matching, path_name

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("cosine", "inverse_sqrt", "constant")


def schedule(config: ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up to `learning_rate`, then `schedule`.

    cosine: down to zero at `steps`. inverse_sqrt: falls as 1/sqrt(step) (Vaswani et al. 2017).
    constant: stays.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1))
    elif config.schedule == "inverse_sqrt":
        offset = max(warmup, 1)

        def after(step: jax.Array) -> jax.Array:
            # It is also asked about steps of the warm-up, which are negative here.
            return peak * jnp.sqrt(offset / (jnp.maximum(step, 0) + offset))
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"train.schedule={config.schedule!r}: expected one of {SCHEDULES}")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: ConfigDict, params: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Adafactor; weight decay on matrices only.

    It is for trees like `params`, of which only the paths matter. Parameters that `trainable`
    leaves out have no state, count in no norm, and get updates of zero. `learning_rate_scales`
    multiplies the learning rate, and with it the weight decay.

    With `parameter_scale`, an update is relative to the root mean square of the parameter that it
    changes (Shazeer and Stern 2018, section 8). T5's initialization, whose scales differ by two
    orders of magnitude, counts on that.

    Raises:
      ValueError: an unknown name, or a pattern without effect.
    """

    def is_matrix(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    transformation = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _direction(config),
        optax.scale_by_param_block_rms() if config.parameter_scale else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(schedule(config)),
    )
    trained = trained_mask(config, params)
    if not all(jax.tree.leaves(trained)):
        transformation = optax.partition(
            {"trained": transformation, "fixed": optax.set_to_zero()},
            jax.tree.map(lambda is_trained: "trained" if is_trained else "fixed", trained),
        )
    if config.learning_rate_scales:
        factors = _rate_factors(config, trained)
        scale = optax.stateless(
            lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, factors)
        )
        transformation = optax.chain(transformation, scale)
    return transformation


def trained_mask(config: ConfigDict, params: Any) -> Any:
    """A tree like `params` of bools: which ones `config.trainable` trains; () trains all.

    Raises:
      ValueError: a pattern that matches no parameter.
    """
    if not config.trainable:
        return jax.tree.map(lambda _: True, params)
    names = _names(params)
    trained = set()
    for pattern in config.trainable:
        trained |= matching(pattern, names, "train.trainable")
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) in trained, params)


def keep_fixed(trained: Any, new: Any, old: Any) -> Any:
    """`new` where the mask `trained` is true, else `old`, bit for bit."""
    return jax.tree.map(lambda is_trained, a, b: a if is_trained else b, trained, new, old)


def check_config(config: ConfigDict) -> None:
    """Checks what can be checked before there are parameters.

    Raises:
      ValueError: an unknown name, or a pattern or a scale that is none.
    """
    _direction(config)
    schedule(config)
    trainable = config.trainable
    if not _is_list(trainable):
        raise ValueError(f"train.trainable={trainable!r}: expected a tuple of patterns")
    for pattern in trainable:
        compiled(pattern, "train.trainable")
    scales = config.learning_rate_scales
    if not _is_list(scales) or not all(_is_list(pair) and len(pair) == 2 for pair in scales):
        raise ValueError(
            f"train.learning_rate_scales={scales!r}: expected pairs of a pattern and a factor"
        )
    for pattern, factor in scales:
        compiled(pattern, "train.learning_rate_scales")
        if not (isinstance(factor, int | float) and math.isfinite(factor) and factor > 0):
            raise ValueError(
                f"train.learning_rate_scales: the factor of {pattern!r} is {factor!r}, expected "
                "a positive number"
            )


def _direction(config: ConfigDict) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        return optax.scale_by_adam(b1=0.9, b2=config.adam_b2)
    if config.optimizer == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    raise ValueError(f"train.optimizer={config.optimizer!r}: expected one of {OPTIMIZERS}")


def _rate_factors(config: ConfigDict, trained: Any) -> Any:
    """A tree like `trained` of the factors on the learning rate; the first match counts."""
    left = {
        path_name(path)
        for path, is_trained in jax.tree_util.tree_leaves_with_path(trained)
        if is_trained
    }
    names = sorted(left)
    factors = {}
    for pattern, factor in config.learning_rate_scales:
        found = matching(pattern, names, "train.learning_rate_scales", what="trained parameter")
        own = left & found
        if not own:
            raise ValueError(
                f"train.learning_rate_scales: {pattern!r} has no effect, patterns before it "
                "match all that it matches"
            )
        left -= own
        factors |= dict.fromkeys(own, factor)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: factors.get(path_name(path), 1.0), trained
    )


def _names(params: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
