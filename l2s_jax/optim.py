"""Optimizers and learning-rate schedules, from optax, by the values of a training config."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

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
            return peak * jnp.sqrt(offset / (step + offset))
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"train.schedule={config.schedule!r}: expected one of {SCHEDULES}")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Adafactor; weight decay on matrices only."""

    def is_matrix(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    rate = schedule(config)
    if config.optimizer == "adamw":
        update = optax.adamw(
            rate, b1=0.9, b2=config.adam_b2, weight_decay=config.weight_decay, mask=is_matrix
        )
    elif config.optimizer == "adafactor":
        update = optax.adafactor(
            rate,
            multiply_by_parameter_scale=False,
            clipping_threshold=1.0,
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=is_matrix,
        )
    else:
        raise ValueError(f"train.optimizer={config.optimizer!r}: expected one of {OPTIMIZERS}")
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return update
