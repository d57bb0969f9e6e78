"""Logit distillation: the divergence against float64 NumPy, and training with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.evaluation import distilled
from l2s_jax.models.lora import Lora
from l2s_jax.training import update
from l2s_jax.training.distillation import Distillation, divergence

ROWS, TOKENS, VOCABULARY = 4, 3, 11
compiled = jax.jit(divergence, static_argnums=4)
gradient_of = jax.jit(jax.grad(divergence), static_argnums=4)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def case(seed, k=4, temperature=1.0, scale=3.0):
    """(SLM's logits, mask, LLM's likeliest ids, their log-probabilities), and all of the LLM's."""
    random = np.random.default_rng(seed)
    shape = (ROWS, TOKENS, VOCABULARY)
    logits = scale * random.standard_normal(shape).astype(np.float32)
    teacher = softmax(scale * random.standard_normal(shape) / temperature)
    ids = np.argsort(-teacher, -1)[..., :k].astype(np.int32)
    log_probs = np.log(np.take_along_axis(teacher, ids, -1)).astype(np.float32)
    mask = random.random((ROWS, TOKENS)) < 0.7
    mask[0, 0] = True
    return (logits, mask, ids, log_probs), teacher


def reference(logits, mask, ids, log_probs, temperature):
    """Sum over tokens, one outcome after another."""
    total = 0.0
    own = softmax(logits.astype(np.float64) / temperature)
    for row, token in zip(*np.nonzero(mask), strict=True):
        p_rest = q_rest = 1.0
        for index, log_p in zip(ids[row, token], log_probs[row, token].astype(float), strict=True):
            if 0 <= index < logits.shape[-1]:
                p, q = np.exp(log_p), own[row, token, index]
                total += p * (log_p - np.log(q))
                p_rest, q_rest = p_rest - p, q_rest - q
        if p_rest > 1e-7:
            total += p_rest * (np.log(p_rest) - np.log(q_rest))
    return total


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1.0, 3.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    known=st.sampled_from([0.5, 1.0]),
)
def test_it_is_the_divergence_of_the_likeliest_tokens_and_all_others(
    seed, scale, temperature, known
):
    (logits, mask, ids, log_probs), _ = case(seed, 4, temperature, scale)
    kept = np.random.default_rng(seed).random(ids.shape) < known
    # What the SLM has no id for: -1, or beyond its vocabulary.
    ids = np.where(kept, ids, np.where(log_probs < -2, -1, VOCABULARY)).astype(np.int32)
    found = compiled(logits, mask, ids, log_probs, temperature)
    assert found.dtype == np.float32 and found.shape == ()
    expected = reference(logits, mask, ids, log_probs, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_tokens_it_is_the_divergence_over_the_vocabulary(k, temperature):
    inputs, teacher = case(1, k, temperature)
    own = softmax(inputs[0].astype(np.float64) / temperature)
    whole = np.sum(teacher * (np.log(teacher) - np.log(own)), -1)
    found = compiled(*inputs, temperature)
    np.testing.assert_allclose(found, np.sum(whole * inputs[1]), rtol=1e-5)
    # With fewer it is less.
    few = tuple(x[..., :3] for x in inputs[2:])
    assert 0 < compiled(*inputs[:2], *few, temperature) < found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_gradient_is_that_of_the_probabilities(temperature):
    (logits, mask, ids, log_probs), _ = case(2, 4, temperature)
    ids[..., 2] = -1  # what the SLM has no id for belongs to the others
    own = softmax(logits.astype(np.float64) / temperature)
    known = np.array([0, 1, 3])
    p = np.exp(log_probs.astype(np.float64))[..., known]
    q = np.take_along_axis(own, ids[..., known], -1)
    # Outside: what the LLM gives to all others, shared as the SLM shares it.
    ratio = (1 - p.sum(-1, keepdims=True)) / (1 - q.sum(-1, keepdims=True))
    expected = own * (1 - ratio)
    np.put_along_axis(expected, ids[..., known], q - p, -1)
    found = gradient_of(logits, mask, ids, log_probs, temperature)
    np.testing.assert_allclose(found, expected * mask[..., None] / temperature, atol=1e-5)


def test_it_is_zero_only_where_the_probabilities_are_the_llms():
    (_, mask, ids, log_probs), teacher = case(3)
    logits = np.log(teacher).astype(np.float32)
    assert abs(compiled(logits, mask, ids, log_probs, 1.0)) < 1e-5
    # The others may be shared in any way.
    others = np.ones_like(teacher)
    np.put_along_axis(others, ids, 0, -1)
    rest = np.where(others, teacher, 0).sum(-1, keepdims=True) / others.sum(-1, keepdims=True)
    even = np.log(np.where(others, rest, teacher)).astype(np.float32)
    assert abs(compiled(even, mask, ids, log_probs, 1.0)) < 1e-5
    # An SLM with the LLM's proportions among its k likeliest, and no other, is too certain.
    certain = np.where(others, -30, np.log(teacher)).astype(np.float32)
    assert compiled(certain, mask, ids, log_probs, 1.0) > 0.1


@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("known", [2, VOCABULARY])
def test_however_certain_the_slm_is_the_gradient_is_finite(size, known):
    (_, mask, ids, log_probs), _ = case(4, known)
    logits = np.full((ROWS, TOKENS, VOCABULARY), -size, np.float32)
    logits[..., 5] = size
    loss, gradient = jax.value_and_grad(divergence)(logits, mask, ids, log_probs, 1.0)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))
    # It does not vanish: each probability has a part of at most one.
    assert 0.1 < np.abs(gradient).max() <= 1.0 + 1e-5
    # An LLM that is as certain leaves nothing to the others.
    sure = np.full_like(log_probs, -np.inf)
    sure[..., 0] = 0.0
    loss, gradient = jax.value_and_grad(divergence)(logits, mask, ids, sure, 1.0)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))


def test_an_slm_that_has_no_other_tokens_learns_nothing_about_them():
    (logits, mask, ids, log_probs), _ = case(5, VOCABULARY)
    missing = log_probs + np.log(np.float32(0.5))  # half of the LLM's are words it doesn't know
    loss, gradient = jax.value_and_grad(divergence)(logits, mask, ids, missing, 1.0)
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))
    whole = gradient_of(logits, mask, ids, log_probs, 1.0)
    np.testing.assert_allclose(gradient, whole / 2, atol=1e-5)


def test_padding_does_not_count():
    (logits, mask, ids, log_probs), _ = case(6)
    loss = compiled(logits, mask, ids, log_probs, 1.0)
    blank = np.where(mask[..., None], ids, -1), np.where(mask[..., None], log_probs, 0)
    np.testing.assert_allclose(compiled(logits, mask, *blank, 1.0), loss, rtol=1e-6)
    for teacher in ((ids, log_probs), blank):
        gradient = np.abs(gradient_of(logits, mask, *teacher, 1.0)).max(-1)
        assert (gradient > 0).tolist() == mask.tolist()


def taught(batch, k, seed=0):
    """A batch with an LLM's k likeliest tokens, and all of its probabilities [B, S, V]."""
    random = np.random.default_rng(seed)
    shape = (*batch["response_ids"].shape, small.VOCABULARY)
    teacher = softmax(2 * random.standard_normal(shape))
    ids = np.argsort(-teacher, -1)[..., :k].astype(np.int32)
    log_probs = np.log(np.take_along_axis(teacher, ids, -1)).astype(np.float32)
    return {**batch, "teacher_ids": ids, "teacher_log_probs": log_probs}, teacher


def one_step(system, trained, frozen, batch, distillation, mesh=None, **config):
    """(change of the parameters by one step of plain gradient descent, metrics)."""
    config = small.make_train_config(100, learning_rate=1e-2, **config)
    optimizer = optax.sgd(1.0)
    mesh = mesh or small.mesh_of()
    shardings = update.state_shardings(trained, optimizer, config, mesh)
    step = update.make_step(system, optimizer, config, 0, shardings, distillation)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda p: update.init_state(p, optimizer, config), out_shardings=shardings)(
            trained
        )
        placed = update.sharding.put_batch(batch, mesh)
        state, metrics = step(state, update.sharding.put_parameters(frozen, mesh), placed)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), trained)
    return change, jax.device_get(metrics)


@pytest.mark.parametrize(("name", "accumulation"), [("slm", 1), ("add", 4)])
def test_a_step_follows_the_mixed_loss_over_tokens(name, accumulation):
    system = small.make_system(name)
    trained, frozen = small.make_params(system)
    batch, teacher = taught(small.make_batch(system, rows=8), small.VOCABULARY)
    mask = batch["response_mask"]

    def mean_loss(trained):
        logits = system.scored(trained, frozen, batch).logits()
        labels = jax.nn.one_hot(batch["response_ids"], small.VOCABULARY)
        entropy = -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
        apart = jnp.sum(teacher * (np.log(teacher) - jax.nn.log_softmax(logits / 2)), -1)
        return jnp.sum((0.7 * entropy + 0.3 * 2**2 * apart) * mask) / mask.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(trained)
    distillation = Distillation(weight=0.3, temperature=2.0)
    change, metrics = one_step(
        system, trained, frozen, batch, distillation, accumulation=accumulation
    )
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    small.assert_same(change, jax.tree.map(lambda g: -g, gradient), rtol=1e-3, atol=1e-5)
    alone = one_step(system, trained, frozen, batch, None)[1]
    assert "divergence" not in alone
    expected = 0.7 * alone["loss"] + 0.3 * 4 * metrics["divergence"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
def test_a_step_is_the_same_on_every_mesh(axes):
    system = small.make_system("add")
    trained, frozen = small.make_params(system)
    batch, _ = taught(small.make_batch(system, rows=8), 5)
    distillation = Distillation(weight=0.5, temperature=1.0)
    alone = one_step(system, trained, frozen, batch, distillation)
    spread = one_step(system, trained, frozen, batch, distillation, small.mesh_of(*axes))
    small.assert_same(spread, alone, rtol=1e-3, atol=1e-5)


def test_lora_learns_the_distributions_too():
    system = small.make_system("slm")
    params, _ = small.make_params(system)
    lora = Lora(system, rank=2, alpha=4.0, pattern=".*attention/.*kernel")
    trained, base = lora.split(params, jax.random.key(0))
    batch, _ = taught(small.make_batch(system, rows=8), 5)
    frozen = {"base": base, "inner": {}}
    distillation = Distillation(weight=1.0, temperature=1.0)
    change, metrics = one_step(lora, trained, frozen, batch, distillation)
    logits = np.asarray(jax.jit(small.logits_of(system))(params, {}, batch))
    teacher_parts = batch["teacher_ids"], batch["teacher_log_probs"]
    mask = batch["response_mask"]
    expected = reference(logits, mask, *teacher_parts, 1.0) / mask.sum()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(change))


def test_an_slm_that_is_the_llm_has_nothing_to_learn():
    system = small.make_system("slm")
    trained, _ = small.make_params(system)
    batch = small.make_batch(system, rows=8)
    teacher = jax.nn.log_softmax(jax.jit(small.logits_of(system))(trained, {}, batch))
    log_probs, ids = jax.device_get(jax.lax.top_k(teacher, 6))
    batch |= {"teacher_ids": ids, "teacher_log_probs": log_probs}
    change, metrics = one_step(system, trained, {}, batch, Distillation(1.0, 1.0))
    assert abs(metrics["divergence"]) < 1e-5
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(change)) < 1e-4
    sideways, _ = one_step(system, trained, {}, batch, Distillation(0.9, 1.0))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(sideways)) > 1e-3


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({}, []),
        ({"on_policy": 0.25}, ["for 25% of the batches", "its own responses"]),
        (
            {"on_policy": 1.0, "distillation": {"weight": 0.5, "top_k": 8, "temperature": 2,
             "left_out": None}},
            ["for 50% of the loss", "for 100% of the batches"],
        ),
    ],
)  # fmt: skip
def test_a_report_says_what_was_learnt_beside_labels(task, said):
    clause = distilled.clause(task)
    assert bool(clause) == bool(said) and all(part in clause for part in said)
