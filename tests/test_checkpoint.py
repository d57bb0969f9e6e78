"""Checkpoints: kept and best steps, and states that move from one mesh to another."""

import jax
import numpy as np
import optax
import pytest
import small

from l2s_jax.training import optim, update
from l2s_jax.training.checkpoint import Checkpoints

CONFIG = small.make_train_config(10, ema_decay=0.9, weight_decay=0.1)
ONE, EIGHT = (1, 1, 1), (2, 2, 2)


def make_state(sizes, config=CONFIG, seed=0):
    """(state with random moments, its abstract arrays) on a mesh."""
    params, _ = small.make_params(small.make_system("add"))
    optimizer = optim.optimizer(config, params)
    mesh = small.mesh_of(*sizes)
    shardings = update.state_shardings(params, optimizer, config, mesh)
    state = update.init_state(params, optimizer, config)
    random = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: (100 * random.random(x.shape)).astype(x.dtype), jax.device_get(state)
    )
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    return jax.device_put(state, shardings), abstract


def trees_of(state):
    opt = {"step": state.step, "opt_state": state.opt_state}
    return {**state.params, "opt": opt, "average": state.average}


def save(checkpoints, step, state, metric=0.0):
    checkpoints.save(
        step,
        trees=trees_of(state),
        data={"next": step},
        config={"fingerprint": "f"},
        metrics=None if metric is None else {"accuracy": metric},
    )


def restore(checkpoints, step, abstract):
    trees, data = checkpoints.restore(step, trees_of(abstract))
    opt, average = trees.pop("opt"), trees.pop("average")
    return update.TrainState(opt["step"], trees, opt["opt_state"], average), data


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
@pytest.mark.parametrize(("saved_on", "restored_on"), [(EIGHT, ONE), (ONE, EIGHT)])
def test_a_state_moves_between_meshes(saved_on, restored_on, optimizer, tmp_path):
    if jax.device_count() < np.prod(EIGHT):
        pytest.skip("needs 8 devices")
    config = small.make_train_config(10, ema_decay=0.9, optimizer=optimizer)
    state, _ = make_state(saved_on, config)
    _, abstract = make_state(restored_on, config, seed=1)
    with Checkpoints(str(tmp_path), best_metric=None) as checkpoints:
        save(checkpoints, 3, state)
    with Checkpoints(str(tmp_path), best_metric=None) as checkpoints:
        assert checkpoints.latest_step == checkpoints.best_step == 3
        assert checkpoints.config(3) == {"fingerprint": "f"}
        restored, data = restore(checkpoints, 3, abstract)
    assert data == {"next": 3}
    small.assert_same(restored, state)
    for leaf, asked in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == asked.sharding
        assert len(leaf.sharding.device_set) == np.prod(restored_on)


def steps_on_disk(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("reopen", [False, True])
def test_the_best_and_the_latest_are_kept(tmp_path, reopen):
    state, abstract = make_state(ONE)
    checkpoints = Checkpoints(str(tmp_path), best_metric="accuracy")
    metrics = {1: 0.2, 2: 0.7, 3: 0.4, 4: 0.1, 5: 0.5, 6: 0.6}
    for step, metric in metrics.items():
        save(checkpoints, step, state.replace(step=np.int32(step)), metric)
        if reopen:
            checkpoints.__exit__()
            checkpoints = Checkpoints(str(tmp_path), best_metric="accuracy")
    with checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (2, 6)
        assert restore(checkpoints, 2, abstract)[0].step == 2
    assert steps_on_disk(tmp_path) == [2, 4, 5, 6]


def test_what_was_not_judged_is_not_the_best(tmp_path):
    state, _ = make_state(ONE)
    with Checkpoints(str(tmp_path), best_metric="accuracy") as checkpoints:
        for step, metric in ((1, None), (2, 0.5), (3, None), (4, 0.3), (5, None), (6, None)):
            save(checkpoints, step, state, metric)
            assert checkpoints.best_step == (None if step == 1 else 2)
        assert checkpoints.latest_step == 6
    assert steps_on_disk(tmp_path) == [2, 4, 5, 6]


def test_without_a_metric_the_newest_are_kept(tmp_path):
    state, abstract = make_state(ONE)
    with Checkpoints(str(tmp_path), best_metric=None) as checkpoints:
        assert checkpoints.latest_step is None and checkpoints.best_step is None
        for step in (1, 2, 3, 4):
            save(checkpoints, step, state, 1.0 / step)
        assert checkpoints.best_step == checkpoints.latest_step == 4
        # Not yet on disk, perhaps: restoring waits for it.
        small.assert_same(restore(checkpoints, 4, abstract)[0], state)
    assert steps_on_disk(tmp_path) == [2, 3, 4]


def test_moments_follow_their_parameters():
    state, _ = make_state(EIGHT)
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state.opt_state, name)
        for leaf, param in zip(
            jax.tree.leaves(moments), jax.tree.leaves(state.params), strict=True
        ):
            assert leaf.sharding == param.sharding
