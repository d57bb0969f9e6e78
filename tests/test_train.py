"""Training: the update, the loop, and runs that are stopped and started again."""

import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import small
import train_child

from l2s_jax.models.systems import parameter_count
from l2s_jax.training import loop, meter, update
from l2s_jax.training.checkpoint import Checkpoints

TESTS = os.path.dirname(os.path.abspath(__file__))


DESCENT = optax.sgd(1.0)


@functools.cache
def make_step(system, optimizer, seed=0, **config):
    """(config, compiled step)."""
    config = small.make_train_config(100, **{"learning_rate": 1e-2, **config})
    return config, jax.jit(
        functools.partial(
            update.train_step, system=system, optimizer=optimizer, config=config, seed=seed
        )
    )


@functools.cache
def case(name="add", **changes):
    system = small.make_system(name, **changes)
    return system, *small.make_params(system)


def gradient_step(name="add", *, batch=None, seed=0, rows=8, at_step=0, slm=(), **config):
    """(change of the parameters by one step of plain gradient descent, metrics)."""
    system, trained, frozen = case(name, **dict(slm))
    config, step = make_step(system, DESCENT, seed, **config)
    state = update.init_state(trained, DESCENT, config).replace(step=jnp.int32(at_step))
    batch = small.make_batch(system, rows=rows) if batch is None else batch
    new, metrics = step(state, frozen, batch)
    assert new.step == at_step + 1
    return jax.tree.map(lambda a, b: np.asarray(a - b), new.params, trained), metrics


@pytest.mark.parametrize("name", ["slm", "add"])
def test_accumulation_gives_the_same_update(name):
    whole, metrics = gradient_step(name)
    parts, metrics_of_parts = gradient_step(name, accumulation=4)
    small.assert_same(parts, whole, rtol=1e-4, atol=1e-6)
    small.assert_same(metrics_of_parts, metrics, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_is_averaged_over_tokens_and_not_over_rows(accumulation):
    system, trained, frozen = case()
    batch = small.make_batch(system, rows=8, response_tokens=9)
    lengths = batch["response_mask"].sum(1)
    assert len(set(lengths)) > 3

    def mean_loss(trained):
        log_p = jax.nn.log_softmax(system.scored(trained, frozen, batch).logits())
        losses = -jnp.take_along_axis(log_p, batch["response_ids"][..., None], -1)[..., 0]
        return jnp.sum(losses * batch["response_mask"]) / batch["response_mask"].sum()

    expected, gradient = jax.jit(jax.value_and_grad(mean_loss))(trained)
    change, metrics = gradient_step(batch=batch, accumulation=accumulation)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), 1e-4)
    small.assert_same(change, jax.tree.map(lambda g: -g, gradient), rtol=1e-4, atol=1e-6)


def test_accuracy_and_learning_rate_are_reported():
    system, trained, frozen = case()
    batch = small.make_batch(system)
    logits = np.asarray(jax.jit(small.logits_of(system))(trained, frozen, batch))
    batch["response_ids"][:2] = logits[:2].argmax(-1)
    # A response is also the decoder's input, so only first tokens are sure to stay likeliest.
    batch["response_mask"][:, 1:] = False
    batch["response_mask"][:, 0] = True
    batch["response_ids"][2:, 0] = (logits[2:, 0].argmax(-1) + 1) % small.VOCABULARY
    _, metrics = gradient_step(batch=batch, at_step=3, warmup_steps=10)
    assert float(metrics["accuracy"]) == pytest.approx(0.5)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2 * 3 / 10)


def test_dropout_is_reproducible_and_differs_by_step_seed_and_part():
    noisy = {"slm": (("dropout_rate", 0.3),), "dropout_rate": 0.3}
    row = small.make_batch(case()[0], rows=1)
    batch = {key: np.repeat(value, 2, axis=0) for key, value in row.items()}
    first = gradient_step(batch=batch, **noisy)[0]
    small.assert_same(gradient_step(batch=batch, **noisy)[0], first)
    assert small.differ(gradient_step(batch=batch, at_step=1, **noisy)[0], first)
    assert small.differ(gradient_step(batch=batch, seed=1, **noisy)[0], first)
    assert small.differ(gradient_step(batch=batch)[0], first)
    # Two parts of the same row with the same dropout would be one part of it.
    one = gradient_step(batch=row, **noisy)[0]
    two = gradient_step(batch=batch, accumulation=2, **noisy)[0]
    ratio = float(optax.tree.norm(jax.tree.map(jnp.subtract, one, two)))
    assert ratio > 0.1 * float(optax.tree.norm(one))


def test_average_follows_the_parameters():
    system, trained, frozen = case()
    optimizer = optax.sgd(0.5)
    config, step = make_step(system, optimizer, ema_decay=0.25)
    state = update.init_state(trained, optimizer, config)
    expected = trained
    for number in range(4):
        state, _ = step(state, frozen, small.make_batch(system, seed=number))
        decay = min(0.25, (1 + number) / (10 + number))
        expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, expected, state.params)  # noqa: B023
        small.assert_same(state.average, expected, rtol=1e-5, atol=1e-6)
    assert small.differ(state.average, state.params)


def fit(
    directory,
    name="slm",
    *,
    pairs=None,
    mesh=(1, 1, 1),
    params=None,
    validation=None,
    wrap=lambda batches: batches,
    fingerprint="f",
    judge=None,
    **config,
):
    system, trained, frozen = case(name)
    pairs = small.random_pairs(16, 5) if pairs is None else pairs
    config = small.make_train_config(**{"learning_rate": 1e-2, **config})
    if validation is None:
        validation = [small.make_batch(system, rows=8)]
    return loop.fit(
        system,
        frozen,
        trained if params is None else params,
        config,
        batches=wrap(small.make_batches(system, pairs, batch_size=config.batch_size)),
        validation=validation,
        directory=str(directory),
        fingerprint=fingerprint,
        seed=0,
        mesh=small.mesh_of(*mesh),
        judge=judge,
    )


def lines_of(directory):
    """metrics.jsonl without what a clock measured."""
    with open(os.path.join(directory, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [{k: v for k, v in line.items() if k not in meter.TIMES} for line in lines]


def scores(name, params, validation):
    system, _, frozen = case(name)
    score = jax.jit(lambda p, f, b: update.batch_loss(system, p, f, b, None, 0.0)[1])
    return loop.validation_scores(score, params, frozen, validation)


@pytest.mark.parametrize("name", ["slm", "add"])
def test_fit_overfits_a_tiny_set(name, tmp_path):
    pairs = small.random_pairs(16, 5)
    batch = next(small.make_batches(case(name)[0], pairs, batch_size=16))
    before = scores(name, case(name)[1], [batch])
    config = {"steps": 150, "evaluate_every": 150, "log_every": 50, "batch_size": 16}
    params = fit(tmp_path, name, pairs=pairs, validation=[batch], **config)
    after = scores(name, params, [batch])
    assert before["val_accuracy"] < 0.3
    assert after["val_accuracy"] > 0.99 and after["val_loss"] < 0.1
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [50, 100, 150, 150]
    assert lines[-1]["val_loss"] == pytest.approx(after["val_loss"], rel=1e-5)
    assert lines[-1]["val_perplexity"] == pytest.approx(np.exp(after["val_loss"]), rel=1e-5)


def test_validation_is_averaged_over_the_tokens_of_all_batches():
    system, trained, _ = case("slm")
    batches = [small.make_batch(system, rows=4, response_tokens=tokens) for tokens in (3, 9)]
    empty = {**batches[0], "response_mask": np.zeros_like(batches[0]["response_mask"])}
    of_all = scores("slm", trained, [*batches, empty])
    tokens = [batch["response_mask"].sum() for batch in batches]
    for key in ("val_loss", "val_accuracy"):
        each = [scores("slm", trained, [batch])[key] for batch in batches]
        assert of_all[key] == pytest.approx(np.average(each, weights=tokens), rel=1e-5)


def test_fit_leaves_the_parameters_it_was_given_alone(tmp_path):
    given = jax.device_put(case("slm")[1], jax.devices()[0])
    kept = jax.tree.map(np.array, given)
    fit(tmp_path, steps=2, params=given)
    small.assert_same(given, kept)


@pytest.mark.parametrize("select", ["best", "last"])
def test_select(select, tmp_path):
    # Validation asks for what the model says before training, so that training makes it worse.
    system, trained, _ = case("slm")
    validation = small.make_batch(system, rows=8, response_tokens=1)
    validation["response_ids"][:] = np.argmax(
        jax.jit(small.logits_of(system))(trained, {}, validation), -1
    )
    params = fit(
        tmp_path,
        steps=6,
        evaluate_every=2,
        select=select,
        validation=[validation],
        learning_rate=0.03,
    )
    accuracies = {
        line["step"]: line["val_accuracy"] for line in lines_of(tmp_path) if "val_accuracy" in line
    }
    assert list(accuracies) == [2, 4, 6]
    assert accuracies[2] > accuracies[6]
    expected = max(accuracies.values()) if select == "best" else accuracies[6]
    assert scores("slm", params, [validation])["val_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_what_is_chosen_is_read_in_the_place_of_what_was_trained(average, tmp_path, monkeypatch):
    def alive():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    found, restored = [], Checkpoints._restored

    def spy(self, step, trees, **others):
        found.append((step, set(trees), alive() - before))
        return restored(self, step, trees, **others)

    monkeypatch.setattr(Checkpoints, "_restored", spy)
    qualities = iter([9.0, 3.0])

    def judge(params, frozen, until):
        return loop.Judged({"val_quality": next(qualities)}, [])

    config = {"steps": 4, "evaluate_every": 2, "ema_decay": average, "judge": judge}
    before = alive()
    chosen = fit(tmp_path / "best", select="quality", **config)
    trees = {"average"} if average else {"slm"}
    assert [(step, names) for step, names, _ in found] == [(2, trees)]
    assert found[0][2] < sum(leaf.nbytes for leaf in jax.tree.leaves(chosen)) / 2
    # A run that is finished reads what it chose, and no state.
    small.assert_same(fit(tmp_path / "best", select="quality", **config), chosen)
    assert [(step, names) for step, names, _ in found[1:]] == [(2, trees)]
    # What was trained last is not read.
    qualities = iter([1.0, 2.0])
    fit(tmp_path / "last", select="quality", **config)
    assert len(found) == 2


def test_checkpoints_with_the_average_beside_the_moments_are_read(tmp_path, monkeypatch):
    """As older versions wrote them."""

    def judge():
        qualities = iter([9.0, 3.0, 5.0])
        return lambda params, frozen, until: loop.Judged({"val_quality": next(qualities)}, [])

    def trees(state):
        opt = {"step": state.step, "opt_state": state.opt_state}
        return {**state.params, "opt": {**opt, "average": state.average}}

    config = {"steps": 6, "evaluate_every": 2, "ema_decay": 0.5}
    chosen = fit(tmp_path / "new", select="quality", judge=judge(), **config)
    last = fit(tmp_path / "whole", select="last", **config)
    for select, expected in (("quality", chosen), ("last", last)):
        directory = tmp_path / select
        with monkeypatch.context() as patch, pytest.raises(small.Stop):
            patch.setattr(loop, "_trees", trees)
            stop = {"wrap": lambda b: small.Stopping(b, 5)}
            fit(directory, select=select, judge=judge(), **stop, **config)
        old = {path.name for path in (directory / "checkpoints/4").iterdir() if path.is_dir()}
        assert old - {"metrics"} == {"slm", "opt", "data", "config"}
        rest = (lambda p, f, u: loop.Judged({"val_quality": 5.0}, [])) if select != "last" else None
        small.assert_same(fit(directory, select=select, judge=rest, **config), expected)
    assert small.differ(chosen, last)


def test_the_devices_are_given_few_steps_ahead(tmp_path, monkeypatch):
    steps, dispatched = [], meter.Meter.dispatched

    def spy(self, step, metrics, *others, **more):
        steps.append(metrics["loss"])
        ready = [loss.is_ready() for loss in steps[:-1]]
        assert ready.count(False) <= 2, ready
        return dispatched(self, step, metrics, *others, **more)

    monkeypatch.setattr(meter.Meter, "dispatched", spy)
    fit(tmp_path / "run", steps=30, log_every=30, evaluate_every=30)
    assert len(steps) == 30


def test_a_judge_chooses_the_checkpoint_and_changes_no_training(tmp_path):
    heard = []

    def judge(params, frozen, until):
        heard.append(jax.device_get(params))
        quality = {1: 3.0, 2: 9.0, 3: 5.0}[len(heard)]
        return loop.Judged({"val_quality": quality}, [{"response": f"after {quality}"}])

    config = {"steps": 6, "evaluate_every": 2, "learning_rate": 0.03, "ema_decay": 0.5}
    last = fit(tmp_path / "alone", select="last", **config)
    chosen = fit(tmp_path / "judged", select="quality", judge=judge, **config)
    small.assert_same(heard[2], last)
    small.assert_same(chosen, heard[1])
    assert small.differ(chosen, last)
    found = [line["val_quality"] for line in lines_of(tmp_path / "judged") if "val_loss" in line]
    assert found == [3.0, 9.0, 5.0]
    samples = (tmp_path / "judged/samples.jsonl").read_text().splitlines()
    assert json.loads(samples[1]) == {"step": 4, "response": "after 9.0"}


def test_the_average_is_what_is_validated_and_returned(tmp_path):
    validation = [small.make_batch(case("slm")[0], rows=8)]
    plain = fit(tmp_path / "plain", steps=4, validation=validation)
    averaged = fit(tmp_path / "averaged", steps=4, ema_decay=0.9, validation=validation)
    assert small.differ(plain, averaged)
    last = lines_of(tmp_path / "averaged")[-1]
    assert last["val_loss"] == pytest.approx(scores("slm", averaged, validation)["val_loss"], 1e-5)


def test_checkpoints_hold_no_llm_parameter(tmp_path):
    _, trained, frozen = case("add")
    fit(tmp_path, "add", steps=2)
    (step,) = (tmp_path / "checkpoints").iterdir()
    items = {path.name for path in step.iterdir() if path.is_dir()}
    assert items - {"metrics"} == {"projector", "slm", "opt", "data", "config"}
    saved = {}
    for item in ("projector", "slm", "opt"):
        with ocp.StandardCheckpointer() as checkpointer:
            saved[item] = checkpointer.restore(step / item)
    small.assert_same(
        {k: jax.tree.map(np.shape, saved[k]) for k in trained}, jax.tree.map(np.shape, trained)
    )
    # Adam's two moments, and a few counters.
    count = parameter_count(trained)
    assert 2 * count <= parameter_count(saved["opt"]) < 2 * count + 10
    # The LLM is 24 wide, and nothing else is: only the projector reads that width.
    arrays = jax.tree.leaves({k: saved[k] for k in ("slm",)})
    assert not any(24 in array.shape for array in arrays)
    kept = {array.tobytes() for array in jax.tree.leaves(saved)}
    assert not any(np.asarray(leaf).tobytes() in kept for leaf in jax.tree.leaves(frozen))


def test_checkpoints_of_another_configuration_are_refused(tmp_path):
    with pytest.raises(small.Stop):
        fit(tmp_path, steps=4, evaluate_every=2, wrap=lambda b: small.Stopping(b, 3))
    with pytest.raises(ValueError, match="come from another configuration"):
        fit(tmp_path, steps=4, evaluate_every=2, fingerprint="g")
    fit(tmp_path, steps=4, evaluate_every=2)


def test_a_run_continues_on_another_mesh(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    config = {"steps": 4, "evaluate_every": 2, "ema_decay": 0.5}
    expected = fit(tmp_path / "whole", "add", **config)
    with pytest.raises(small.Stop):
        fit(
            tmp_path / "parts", "add", mesh=(2, 2, 2), wrap=lambda b: small.Stopping(b, 3), **config
        )
    params = fit(tmp_path / "parts", "add", **config)
    small.assert_same(params, expected, rtol=1e-3, atol=2e-4)
    for line, other in zip(lines_of(tmp_path / "parts"), lines_of(tmp_path / "whole"), strict=True):
        assert line == pytest.approx(other, rel=1e-3)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return train_child.run(str(directory)), lines_of(directory)


def test_a_stopped_run_continues_exactly(uninterrupted, tmp_path):
    # Before the first checkpoint, between two, and at one.
    for batches in (1, 5, 9):
        with pytest.raises(small.Stop):
            train_child.run(str(tmp_path), wrap=lambda b: small.Stopping(b, batches))  # noqa: B023
    small.assert_same(train_child.run(str(tmp_path)), uninterrupted[0])
    assert lines_of(tmp_path) == uninterrupted[1]
    # A finished run is only read again.
    small.assert_same(
        train_child.run(str(tmp_path), wrap=lambda b: small.Stopping(b, 0)), uninterrupted[0]
    )
    assert lines_of(tmp_path) == uninterrupted[1]


def test_a_killed_run_continues_exactly(uninterrupted, tmp_path):
    def start(seconds_per_step):
        return subprocess.Popen(
            [
                sys.executable,
                os.path.join(TESTS, "train_child.py"),
                str(tmp_path),
                str(seconds_per_step),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(TESTS), *sys.path])},
            stderr=subprocess.PIPE,
            text=True,
        )

    child = start(0.05)
    metrics = tmp_path / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    delay = random.uniform(0, 1.2)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    reached = metrics.read_text().count("\n")
    assert child.returncode == -signal.SIGKILL, f"ended before it was killed, {delay} s"

    child = start(0)
    errors = child.communicate()[1]
    assert child.returncode == 0, f"killed after {delay} s, {reached} lines: {errors}"
    with np.load(tmp_path / "weights.npz") as saved:
        weights = [saved[str(i)] for i in range(len(saved.files))]
    small.assert_same(weights, jax.tree.leaves(uninterrupted[0]))
    assert lines_of(tmp_path) == uninterrupted[1], f"killed after {delay} s, {reached} lines"
