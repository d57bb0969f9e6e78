"""Schedules and optimizers against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2s_jax.config import train_config
from l2s_jax.optim import OPTIMIZERS, SCHEDULES, optimizer, schedule

PEAK, STEPS = 0.01, 100


def config_of(**changes):
    config = train_config(STEPS)
    config.update(**{"learning_rate": PEAK, "parameter_scale": False, **changes})
    return config


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_follows_its_formula(name, warmup):
    def expected(step):
        if step < warmup:
            return PEAK * step / warmup
        if name == "cosine":
            return PEAK * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2
        if name == "inverse_sqrt":
            return PEAK * math.sqrt(warmup / step) if warmup else PEAK / math.sqrt(step + 1)
        return PEAK

    rate = schedule(config_of(schedule=name, warmup_steps=warmup))
    steps = [0, 1, 10, 19, 20, 21, 50, 80, 99, 100]
    np.testing.assert_allclose(
        [float(rate(step)) for step in steps], list(map(expected, steps)), rtol=1e-5, atol=1e-9
    )


def test_cosine_stays_at_zero_after_the_last_step():
    rate = schedule(config_of(schedule="cosine", warmup_steps=10))
    assert float(rate(STEPS + 50)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("warmup", [STEPS, STEPS + 50])
def test_warmup_as_long_as_the_run(warmup):
    rate = schedule(config_of(schedule="cosine", warmup_steps=warmup))
    assert float(rate(STEPS // 2)) == pytest.approx(PEAK * STEPS / 2 / warmup)


PARAMS = {
    "layer": {"kernel": jnp.full((4, 3), 2.0), "scale": jnp.full((4,), 2.0)},
    "embedding": jnp.full((5, 4), -3.0),
}


def update(config, gradients, steps=1):
    transformation = optimizer(config)
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(steps):
        updates, state = transformation.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_only_by_rate_times_decay(name):
    config = config_of(optimizer=name, weight_decay=0.1, schedule="constant")
    params = update(config, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_array_equal(params["layer"]["scale"], 2.0)
    np.testing.assert_allclose(params["layer"]["kernel"], 2.0 * (1 - PEAK * 0.1), rtol=1e-6)
    np.testing.assert_allclose(params["embedding"], -3.0 * (1 - PEAK * 0.1), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_follows_the_schedule(name):
    config = config_of(optimizer=name, weight_decay=0.1, schedule="constant", warmup_steps=10)
    params = update(config, jax.tree.map(jnp.zeros_like, PARAMS), steps=3)
    expected = 2.0 * np.prod([1 - PEAK * step / 10 * 0.1 for step in range(3)])
    np.testing.assert_allclose(params["layer"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_goes_against_the_gradient_by_the_learning_rate(name):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(optimizer=name, schedule="constant", clip_norm=0.0)
    moved = jax.tree.map(lambda new, old: new - old, update(config, gradients), PARAMS)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, -PEAK, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameter_scale_makes_updates_relative_and_leaves_weight_decay_alone(name):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(optimizer=name, schedule="constant", parameter_scale=True, weight_decay=0.1)
    params = update(config, gradients)
    # All numbers of a parameter are alike, so its root mean square is their size.
    np.testing.assert_allclose(params["layer"]["scale"], 2.0 - PEAK * 2.0, rtol=1e-5)
    np.testing.assert_allclose(params["layer"]["kernel"], 2.0 - PEAK * (2.0 + 0.2), rtol=1e-5)
    np.testing.assert_allclose(params["embedding"], -3.0 - PEAK * (3.0 - 0.3), rtol=1e-5)


def test_adamw_equals_its_formula_over_steps():
    config = config_of(schedule="constant", clip_norm=0.0, weight_decay=0.01, adam_b2=0.95)
    transformation = optimizer(config)
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.standard_normal((3, 2)), jnp.float32)}
    state = transformation.init(params)
    expected = np.float64(params["kernel"])
    first, second = np.zeros((3, 2)), np.zeros((3, 2))
    for step in range(1, 6):
        gradient = random.standard_normal((3, 2))
        updates, state = transformation.update(
            {"kernel": jnp.asarray(gradient, jnp.float32)}, state, params
        )
        params = optax.apply_updates(params, updates)
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        direction = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        expected = expected - PEAK * (direction + 0.01 * expected)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


def test_adafactor_minimizes():
    config = config_of(optimizer="adafactor", schedule="constant", learning_rate=0.1)
    transformation = optimizer(config)
    params, state = PARAMS, transformation.init(PARAMS)

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = transformation.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.01 * loss(PARAMS)


def test_clipping_is_by_the_global_norm():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 100.0), PARAMS)
    clip = optimizer(config_of(clip_norm=1.0, schedule="constant"))
    first_moments = clip.update(gradients, clip.init(PARAMS), PARAMS)[1]
    mu = optax.tree_utils.tree_get(first_moments, "mu")
    assert float(optax.global_norm(mu)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("key", ["optimizer", "schedule"])
def test_unknown_names_are_refused(key):
    with pytest.raises(ValueError, match=f"train.{key}='adam': expected one of"):
        optimizer(config_of(**{key: "adam"}))
