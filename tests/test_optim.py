"""Schedules and optimizers against their formulas, and what a config lets them train."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from ml_collections import ConfigDict

from l2s_jax.cluster.paths import path_name
from l2s_jax.cluster.sharding import parameter_shardings
from l2s_jax.models.systems import parameter_count
from l2s_jax.settings.declare import read
from l2s_jax.settings.training import Train
from l2s_jax.training import loop, update
from l2s_jax.training.optim import OPTIMIZERS, SCHEDULES, optimizer, schedule, trained_mask

PEAK, STEPS = 0.01, 100


def config_of(**changes):
    config = ConfigDict(dataclasses.asdict(Train(steps=STEPS)))
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
            return PEAK * math.sqrt(warmup / step if warmup else 1000 / (1000 + step))
        return PEAK

    rate = schedule(config_of(schedule=name, warmup_steps=warmup))
    steps = [0, 1, 10, 19, 20, 21, 50, 80, 99, 100]
    np.testing.assert_allclose(
        [float(rate(step)) for step in steps], list(map(expected, steps)), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("warmup", [0, 20])
def test_a_timescale_says_how_fast_inverse_sqrt_falls(warmup):
    rate = schedule(config_of(schedule="inverse_sqrt", warmup_steps=warmup, timescale=300))
    for after, share in ((0, 1.0), (300, 0.5**0.5), (900, 0.5), (2400, 1 / 3)):
        assert float(rate(warmup + after)) == pytest.approx(PEAK * share)


def test_without_a_warmup_inverse_sqrt_is_no_cliff():
    rate = schedule(config_of(schedule="inverse_sqrt"))
    assert float(rate(1000)) == pytest.approx(PEAK / 2**0.5)


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


def updated(config, gradients, steps=1):
    transformation = optimizer(config, PARAMS)
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(steps):
        updates, state = transformation.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_only_by_rate_times_decay(name):
    config = config_of(optimizer=name, weight_decay=0.1, schedule="constant")
    params = updated(config, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_array_equal(params["layer"]["scale"], 2.0)
    np.testing.assert_allclose(params["layer"]["kernel"], 2.0 * (1 - PEAK * 0.1), rtol=1e-6)
    np.testing.assert_allclose(params["embedding"], -3.0 * (1 - PEAK * 0.1), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_follows_the_schedule(name):
    config = config_of(optimizer=name, weight_decay=0.1, schedule="constant", warmup_steps=10)
    params = updated(config, jax.tree.map(jnp.zeros_like, PARAMS), steps=3)
    expected = 2.0 * np.prod([1 - PEAK * step / 10 * 0.1 for step in range(3)])
    np.testing.assert_allclose(params["layer"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_goes_against_the_gradient_by_the_learning_rate(name):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(optimizer=name, schedule="constant", clip_norm=0.0)
    moved = jax.tree.map(lambda new, old: new - old, updated(config, gradients), PARAMS)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, -PEAK, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameter_scale_makes_updates_relative_and_leaves_weight_decay_alone(name):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(optimizer=name, schedule="constant", parameter_scale=True, weight_decay=0.1)
    params = updated(config, gradients)
    # All numbers of a parameter are alike, so its root mean square is their size.
    np.testing.assert_allclose(params["layer"]["scale"], 2.0 - PEAK * 2.0, rtol=1e-5)
    np.testing.assert_allclose(params["layer"]["kernel"], 2.0 - PEAK * (2.0 + 0.2), rtol=1e-5)
    np.testing.assert_allclose(params["embedding"], -3.0 - PEAK * (3.0 - 0.3), rtol=1e-5)


def test_adamw_equals_its_formula_over_steps():
    config = config_of(schedule="constant", clip_norm=0.0, weight_decay=0.01, adam_b2=0.95)
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.standard_normal((3, 2)), jnp.float32)}
    transformation = optimizer(config, params)
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
    transformation = optimizer(config, PARAMS)
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
    clip = optimizer(config_of(clip_norm=1.0, schedule="constant"), PARAMS)
    first_moments = clip.update(gradients, clip.init(PARAMS), PARAMS)[1]
    mu = optax.tree_utils.tree_get(first_moments, "mu")
    assert float(optax.tree.norm(mu)) == pytest.approx(0.1, rel=1e-5)


def test_patterns_match_whole_paths():
    def trained(*patterns):
        mask = trained_mask(config_of(trainable=patterns), PARAMS)
        leaves = jax.tree_util.tree_leaves_with_path(mask)
        return {path_name(path) for path, is_trained in leaves if is_trained}

    assert trained() == {"layer/kernel", "layer/scale", "embedding"}
    assert trained("layer/.*") == {"layer/kernel", "layer/scale"}
    assert trained(".*/scale", "emb.*g") == {"layer/scale", "embedding"}
    assert trained("layer/kernel|layer/scale|layer") == {"layer/kernel", "layer/scale"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_trained_has_no_state_and_does_not_move(name):
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(optimizer=name, weight_decay=0.1, trainable=("layer/.*",))
    params = updated(config, gradients, steps=2)
    small.assert_same(params["embedding"], PARAMS["embedding"])
    assert small.differ(params["layer"], PARAMS["layer"])
    state = optimizer(config, PARAMS).init(PARAMS)
    alone = optimizer(config_of(optimizer=name), PARAMS["layer"]).init(PARAMS["layer"])
    assert parameter_count(state) == parameter_count(alone)
    # And the rest trains as if it were alone.
    config.update(trainable=())
    transformation = optimizer(config, PARAMS["layer"])
    expected, state = PARAMS["layer"], transformation.init(PARAMS["layer"])
    for _ in range(2):
        updates, state = transformation.update(gradients["layer"], state, expected)
        expected = optax.apply_updates(expected, updates)
    small.assert_same(params["layer"], expected)


def test_what_is_not_trained_does_not_count_in_clipping():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.001), PARAMS)
    gradients["embedding"] = jnp.full_like(PARAMS["embedding"], 1e6)
    clip = optimizer(config_of(clip_norm=1.0, trainable=("layer/.*",)), PARAMS)
    first_moments = clip.update(gradients, clip.init(PARAMS), PARAMS)[1]
    for moment in jax.tree.leaves(optax.tree_utils.tree_get(first_moments, "mu")):
        np.testing.assert_allclose(moment, 0.1 * 0.001, rtol=1e-5)


def test_scales_multiply_learning_rate_and_weight_decay_and_the_first_match_counts():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(
        schedule="constant",
        weight_decay=0.1,
        learning_rate_scales=(("layer/kernel", 5.0), ("layer/.*", 0.5)),
    )
    params = updated(config, gradients)
    rates = PEAK * np.array([5.0, 0.5, 1.0])
    np.testing.assert_allclose(params["layer"]["kernel"], 2 - rates[0] * (1 + 0.2), rtol=1e-5)
    np.testing.assert_allclose(params["layer"]["scale"], 2 - rates[1], rtol=1e-5)
    np.testing.assert_allclose(params["embedding"], -3 - rates[2] * (1 - 0.3), rtol=1e-5)


def test_scales_and_trainable_go_together():
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
    config = config_of(
        schedule="constant",
        trainable=("layer/.*",),
        learning_rate_scales=((".*kernel", 3),),
    )
    params = updated(config, gradients)
    np.testing.assert_allclose(params["layer"]["kernel"], 2 - PEAK * 3, rtol=1e-5)
    np.testing.assert_allclose(params["layer"]["scale"], 2 - PEAK, rtol=1e-5)
    small.assert_same(params["embedding"], PARAMS["embedding"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainable": ("layer/.*", "layer/kernl")},
            r"train.trainable: 'layer/kernl' matches none of 3 parameters; the nearest: "
            r"layer/kernel, layer/scale, embedding$",
        ),
        # A part of a path is no match.
        ({"trainable": ("layer",)}, r"train.trainable: 'layer' matches none of 3"),
        (
            {"learning_rate_scales": (("head/.*", 2.0),)},
            r"train.learning_rate_scales: 'head/\.\*' matches none of 3 trained parameters",
        ),
        (
            {"trainable": ("layer/.*",), "learning_rate_scales": (("embedding", 2.0),)},
            r"train.learning_rate_scales: 'embedding' matches none of 2 trained parameters",
        ),
        (
            {"learning_rate_scales": (("layer/.*", 2.0), (".*kernel", 3.0))},
            r"train.learning_rate_scales: '\.\*kernel' has no effect",
        ),
    ],
)
def test_patterns_without_effect_are_refused(changes, message):
    config = config_of(**changes)
    read(Train, config.to_dict(), "train")
    with pytest.raises(ValueError, match=message) as error:
        optimizer(config, PARAMS)
    assert "\n" not in str(error.value)


def test_the_list_of_nearest_paths_is_short():
    params = {f"layers_{i}": {"kernel": np.zeros((2, 2))} for i in range(500)}
    with pytest.raises(ValueError, match="none of 500 parameters") as error:
        optimizer(config_of(trainable=("layers_7/kernle",)), params)
    assert "layers_7/kernel" in str(error.value)
    assert len(str(error.value)) < 200


def fit(directory, batches=100, mesh=(1, 1, 1), **changes):
    """(parameters before, after) a run that stops after so many batches."""
    system = small.make_system("add")
    params, frozen = small.make_params(system)
    # Numbers that a sum with zero, or a mean with themselves, would not leave alone.
    params["slm"]["encoder"]["final_norm"]["scale"][:3] = [-0.0, 1e-40, 1 / 3]
    config = small.make_train_config(
        6, evaluate_every=2, learning_rate=1e-2, accumulation=2, select="last", **changes
    )
    after = loop.fit(
        system,
        frozen,
        params,
        config,
        batches=small.Stopping(
            small.make_batches(system, small.random_pairs(30, 7), batch_size=8), batches
        ),
        validation=[small.make_batch(system, rows=4)],  # as many as a part of a step
        directory=str(directory),
        fingerprint="f",
        seed=0,
        mesh=small.mesh_of(*mesh),
    )
    return params, after


PARTLY = {"trainable": ("projector/.*", "slm/decoder/.*"), "learning_rate_scales": (("p.*", 5.0),)}


@pytest.mark.parametrize(
    ("name", "ema_decay", "mesh"),
    [("adamw", 0.0, (1, 1, 1)), ("adafactor", 0.9, (1, 1, 1)), ("adamw", 0.9, (2, 2, 2))],
)
def test_a_run_keeps_the_bits_of_what_it_does_not_train(name, ema_decay, mesh, tmp_path):
    if jax.device_count() < np.prod(mesh):
        pytest.skip("needs 8 devices")
    settings = {"optimizer": name, "ema_decay": ema_decay, "weight_decay": 0.1, **PARTLY}
    before, after = fit(tmp_path / "whole", mesh=mesh, **settings)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    old = jax.tree_util.tree_leaves_with_path(before)
    for (path, was), leaf in zip(old, jax.tree.leaves(after), strict=True):
        path = path_name(path)
        same = was.tobytes() == np.asarray(leaf).tobytes()
        assert same == (not path.startswith(("projector/", "slm/decoder/"))), path

    # Stopped between two checkpoints, and continued from the first.
    with pytest.raises(small.Stop):
        fit(tmp_path / "parts", 3, mesh=mesh, **settings)
    small.assert_same(fit(tmp_path / "parts", mesh=mesh, **settings)[1], after)


def test_moments_of_what_is_trained_lie_where_their_parameters_lie():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    params, _ = small.make_params(small.make_system("add"))
    config = config_of(**PARTLY)
    mesh = small.mesh_of(2, 2, 2)
    shardings = update.state_shardings(params, optimizer(config, params), config, mesh)
    asked = parameter_shardings(params, mesh)
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(shardings.opt_state, name)
        assert moments["projector"] == asked["projector"]
        assert moments["slm"]["decoder"] == asked["slm"]["decoder"]
        assert not jax.tree.leaves({**moments["slm"], "decoder": {}})


def test_the_reported_gradient_norm_is_that_of_what_is_trained():
    system = small.make_system("slm")
    params, _ = small.make_params(system)
    batch = small.make_batch(system, rows=8)
    config = small.make_train_config(4, trainable=("slm/decoder/.*",))
    transformation = optimizer(config, params)
    state = update.init_state(params, transformation, config)

    @jax.jit
    def run(state, batch):
        arguments = {"system": system, "optimizer": transformation, "config": config, "seed": 0}
        return update.train_step(state, {}, batch, **arguments)[1]["grad_norm"]

    @jax.jit
    @jax.grad
    def gradient(decoder, batch):
        tree = {"slm": {**params["slm"], "decoder": decoder}}
        loss, sums = update.batch_loss(system, tree, {}, batch, None, 0.0)
        return loss / sums["tokens"]

    expected = optax.tree.norm(gradient(params["slm"]["decoder"], batch))
    assert float(run(state, batch)) == pytest.approx(float(expected), rel=1e-5)
