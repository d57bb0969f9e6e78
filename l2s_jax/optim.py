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
            # It is also asked about steps of the warm-up, which are negative here.
            return peak * jnp.sqrt(offset / (jnp.maximum(step, 0) + offset))
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"train.schedule={config.schedule!r}: expected one of {SCHEDULES}")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Adafactor; weight decay on matrices only.

    With `parameter_scale`, an update is relative to the root mean square of the parameter that it
    changes (Shazeer and Stern 2018, section 8). T5's initialization, whose scales differ by two
    orders of magnitude, counts on that.
    """

    def is_matrix(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    if config.optimizer == "adamw":
        update = optax.scale_by_adam(b1=0.9, b2=config.adam_b2)
    elif config.optimizer == "adafactor":
        update = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        raise ValueError(f"train.optimizer={config.optimizer!r}: expected one of {OPTIMIZERS}")
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        update,
        optax.scale_by_param_block_rms() if config.parameter_scale else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(schedule(config)),
    )
