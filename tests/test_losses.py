"""The loss against float64 NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.training.losses import correct_tokens, cross_entropy

ROWS, TOKENS, VOCABULARY = 6, 4, 11
compiled = jax.jit(cross_entropy, static_argnums=3)


def case(seed, scale=3.0):
    random = np.random.default_rng(seed)
    logits = scale * random.standard_normal((ROWS, TOKENS, VOCABULARY)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (ROWS, TOKENS), dtype=np.int32)
    return logits, targets, random.random((ROWS, TOKENS)) < 0.6


def reference(logits, targets, mask, smoothing):
    total = 0.0
    logits = logits.astype(np.float64)
    for row, token in zip(*np.nonzero(mask), strict=True):
        x = logits[row, token]
        log_p = x - x.max() - np.log(np.exp(x - x.max()).sum())
        wanted = np.full(VOCABULARY, smoothing / VOCABULARY)
        wanted[targets[row, token]] += 1 - smoothing
        total -= (wanted * log_p).sum()
    return total


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_cross_entropy_equals_float64(seed, scale, smoothing):
    logits, targets, mask = case(seed, scale)
    loss, tokens = compiled(logits, targets, mask, smoothing)
    assert loss.dtype == tokens.dtype == np.float32
    assert tokens == mask.sum()
    np.testing.assert_allclose(loss, reference(logits, targets, mask, smoothing), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sums_over_shards_add_up_to_the_whole(smoothing):
    inputs = case(1)
    whole = compiled(*inputs, smoothing)
    shards = [compiled(*(x[i : i + 2] for x in inputs), smoothing) for i in range(0, ROWS, 2)]
    np.testing.assert_allclose(np.sum(shards, axis=0), whole, rtol=1e-6)


def test_masked_positions_have_no_loss_and_no_gradient():
    logits, targets, mask = case(2)
    gradient = jax.grad(lambda x: cross_entropy(x, targets, mask, 0.1)[0])(logits)
    assert (np.abs(gradient).max(-1) > 0).tolist() == mask.tolist()
    changed = np.where(mask, targets, (targets + 1) % VOCABULARY)
    assert compiled(logits, changed, mask, 0.1)[0] == compiled(logits, targets, mask, 0.1)[0]


def test_no_tokens_give_zero():
    logits, targets, mask = case(3)
    assert [float(x) for x in compiled(logits, targets, np.zeros_like(mask), 0.1)] == [0, 0]


def test_correct_tokens_counts_where_the_target_is_likeliest():
    logits, targets, mask = case(4)
    targets[:3] = logits[:3].argmax(-1)
    expected = ((logits.argmax(-1) == targets) & mask).sum()
    assert 0 < expected < mask.sum()
    assert correct_tokens(logits, targets, mask) == expected


def test_accuracy_costs_no_pass_over_the_logits():
    """It needs the largest logit and the true one, as the loss does."""

    def costs(*, counted):
        def read(table, states, targets, mask):
            logits = (states @ table).reshape(*targets.shape, -1)
            loss, number = cross_entropy(logits, targets, mask, 0.1)
            return loss, correct_tokens(logits, targets, mask) if counted else number

        shapes = (
            jax.ShapeDtypeStruct((16, 32_000), np.float32),
            jax.ShapeDtypeStruct((64, 16), np.float32),
            jax.ShapeDtypeStruct((8, 8), np.int32),
            jax.ShapeDtypeStruct((8, 8), np.bool_),
        )
        step = jax.jit(jax.value_and_grad(read, has_aux=True)).lower(*shapes).compile()
        found = step.cost_analysis()
        return found["flops"], found["bytes accessed"], step.memory_analysis().temp_size_in_bytes

    without, with_it = costs(counted=False), costs(counted=True)
    np.testing.assert_allclose(with_it, without, rtol=1e-3)
