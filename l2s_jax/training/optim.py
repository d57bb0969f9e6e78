"""Optimizers and learning-rate schedules, from optax, by the values of a training config.

Patterns (`trainable`, `learning_rate_scales`) are regular expressions that have to match the whole
'/'-joined path of a parameter in the tree that is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from l2s_jax.cluster.paths import matching, path_name
from l2s_jax.settings.training import DEFAULT_TIMESCALE


def _inverse_sqrt(config: ConfigDict) -> optax.Schedule:
    peak = config.learning_rate
    offset = config.timescale or config.warmup_steps or DEFAULT_TIMESCALE
    # It is also asked about steps of the warm-up, which are negative here.
    return lambda step: peak * jnp.sqrt(offset / (jnp.maximum(step, 0) + offset))


# The learning rate after the warm-up, as a function of the steps since.
SCHEDULES: dict[str, Callable[[ConfigDict], optax.Schedule]] = {
    "cosine": lambda config: optax.cosine_decay_schedule(
        config.learning_rate, max(config.steps - config.warmup_steps, 1)
    ),
    "inverse_sqrt": _inverse_sqrt,
    "constant": lambda config: optax.constant_schedule(config.learning_rate),
}
# The direction of an update.
OPTIMIZERS: dict[str, Callable[[ConfigDict], optax.GradientTransformation]] = {
    "adamw": lambda config: optax.scale_by_adam(b1=0.9, b2=config.adam_b2),
    "adafactor": lambda config: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
}


def schedule(config: ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up to `learning_rate`, then `schedule`.

    cosine: down to zero at `steps`. inverse_sqrt: falls as sqrt(t / (t + steps since)), t being the
    timescale; where that is the warm-up's, as 1/sqrt(step) (Vaswani et al. 2017). constant: stays.
    """
    warmup, after = config.warmup_steps, SCHEDULES[config.schedule](config)
    if not warmup:
        return after
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, after], [warmup])


def optimizer(config: ConfigDict, params: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Adafactor; weight decay on matrices only.

    It is for trees like `params`, of which only the paths matter. Parameters that `trainable`
    leaves out have no state, count in no norm, and get updates of zero. `learning_rate_scales`
    multiplies the learning rate, and with it the weight decay.

    With `parameter_scale`, an update is relative to the root mean square of the parameter that it
    changes (Shazeer and Stern 2018, section 8). T5's initialization, whose scales differ by two
    orders of magnitude, counts on that.

    Raises:
      ValueError: a pattern without effect.
    """

    def is_matrix(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    transformation = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        OPTIMIZERS[config.optimizer](config),
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
