"""Attention in blocks and by the kernel for TPUs, beside scores that are made at once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.models import attention
from l2s_jax.models.attention import attend
from l2s_jax.models.biases import MASKED, CausalBias, DistanceBias, mask_bias
from l2s_jax.models.cache import KeyValue
from l2s_jax.models.causal import token_positions
from l2s_jax.models.families import make_module
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.layers import Dropout
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.stacking import stack_layers

# Sizes that programs are made for change here.
pytestmark = pytest.mark.usefixtures("programs_of_its_own")

SCALE = 0.3


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def parts(rows, heads, groups, queries, keys, width, dtype=jnp.float32):
    """Queries, and keys and values."""
    query = normal(rows, heads, queries, width, dtype=dtype)
    key, value = (normal(rows, groups, keys, width, seed=i, dtype=dtype) for i in (1, 2))
    return query, KeyValue(key, value)


def plain(query, key_value, bias):
    """Attention by its formula (Vaswani et al. 2017), in float64."""
    query, key, value, bias = (
        np.asarray(x, np.float64) for x in (query, key_value.key, key_value.value, bias)
    )
    key, value = (np.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    scores = query @ key.swapaxes(2, 3) * SCALE + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ value
    return mixed.swapaxes(1, 2).reshape(*mixed.shape[::2], -1)


@pytest.fixture
def few_scores(monkeypatch):
    """Blocks of few queries and keys."""
    small_blocks(monkeypatch)


def small_blocks(monkeypatch, scores=60, queries=3, keys=4):
    for name, size in (("SCORES", scores), ("QUERIES", queries), ("KEYS", keys)):
        monkeypatch.setattr(attention, name, size)


def sight(mask, window):
    """Which keys each query sees, one pair after the other."""
    mask = np.asarray(mask)
    seen = np.zeros((*mask.shape, mask.shape[1]), bool)
    for row, real in enumerate(mask):
        for query in range(len(real)):
            nearest = [key for key in range(query + 1) if real[key]]
            # Padding has the position of the real token before it.
            nearest = nearest if window is None else nearest[-window:]
            seen[row, query, nearest] = True
    return seen[:, None]


@settings(max_examples=25, deadline=None)
@given(
    mask=st.integers(1, 40).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=2
        )
    ),
    window=st.none() | st.integers(1, 9),
    start=st.integers(0, 39),
    queries=st.integers(1, 7),
    first=st.integers(0, 39),
    keys=st.integers(1, 7),
)
def test_a_block_of_a_causal_bias_is_that_of_its_queries(mask, window, start, queries, first, keys):
    mask = np.asarray(mask)
    start, first = (min(slot, mask.shape[1] - 1) for slot in (start, first))
    bias = CausalBias(mask, token_positions(jnp.asarray(mask)), window)
    found = np.asarray(bias.block(start, queries, first, keys))
    visible = sight(mask, window)[:, :, start : start + queries, first : first + keys]
    expected = np.where(visible, 0.0, MASKED)
    # A block may have more than there are.
    np.testing.assert_array_equal(found[:, :, : visible.shape[2], : visible.shape[3]], expected)
    assert bias.sees(start, queries, first, keys) or not visible.any()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 30),
    start=st.integers(0, 29),
    queries=st.integers(1, 9),
    first=st.integers(0, 29),
    keys=st.integers(1, 9),
    reach=st.sampled_from([1, 3, 30]),
)
def test_a_block_of_a_bias_by_distance_is_that_of_its_queries(
    length, start, queries, first, keys, reach
):
    start, first = min(start, length - 1), min(first, length - 1)
    by_distance = np.arange(2 * (2 * length - 1), dtype=np.float32).reshape(2, -1)
    far = np.abs(np.arange(1 - length, length)) >= reach
    by_distance[:, far] = np.where(np.arange(1 - length, length) > 0, 7.5, 8.5)[far]
    bias = DistanceBias(np.ones((1, length), bool), jnp.asarray(by_distance), reach)
    found = np.asarray(bias.block(start, queries, first, keys))
    for query in range(start, min(start + queries, length)):
        for key in range(first, min(first + keys, length)):
            expected = by_distance[:, length - 1 + key - query]
            np.testing.assert_array_equal(found[0, :, query - start, key - first], expected)


def biases(mask):
    length = mask.shape[1]
    positions = token_positions(mask)
    return {
        "array": normal(1, 4, length, length, seed=3) + mask_bias(mask)[:, None, None, :],
        "one row": mask_bias(mask)[:, None, None, :],
        "causal": CausalBias(mask, positions, None),
        "window": CausalBias(mask, positions, 5),
        "window by a number": CausalBias(mask, positions, jnp.int32(5)),
        "distance": DistanceBias(mask, normal(4, 2 * length - 1, seed=4), length),
    }


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("length", [9, 24, 41])
@pytest.mark.parametrize("kind", list(biases(jnp.ones((1, 2), bool))))
def test_blocks_are_attention(few_scores, kind, length, groups):
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (2, length))
    query, key_value = parts(2, 4, groups, length, length, 6)
    bias = biases(mask)[kind]
    assert not attention.at_once(length, length)
    whole = bias if isinstance(bias, jax.Array) else bias.block(0, length, 0, length)
    found = jax.jit(attend, static_argnums=3)(query, key_value, bias, SCALE)
    # What sees nothing is padding; blocks of nothing that is visible are left out for it.
    seeing = np.broadcast_to((whole > MASKED / 2).any((1, 3)), (2, length))
    expected = plain(query, key_value, whole)
    assert np.isfinite(found).all() and seeing.any()
    np.testing.assert_allclose(found[seeing], expected[seeing], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["causal", "window", "distance", "array"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_gradient_through_blocks_is_that_of_all_scores(monkeypatch, kind, dtype, rate):
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (2, 30))
    query, key_value = parts(2, 4, 2, 30, 30, 6, dtype)
    bias = biases(mask)[kind]
    weights = normal(2, 30, 24, seed=6) * (jnp.cumsum(mask, axis=1) > 0)[:, :, None]
    drop = Dropout(rate)

    def loss(query, key_value, bias):
        dropped = functools.partial(
            drop.apply, {}, deterministic=False, rngs={"dropout": jax.random.key(7)}
        )
        found = attend(query, key_value, bias, SCALE, dropped if rate else None)
        return jnp.sum(found.astype(jnp.float32) * weights)

    differentiated = (query, key_value), bias.by_distance if kind == "distance" else bias
    if kind in ("causal", "window"):
        of_all = jax.value_and_grad(lambda both: loss(*both, bias))
        arguments = (differentiated[0],)
    else:

        def of_bias(both, numbers):
            return loss(*both, bias.replace(by_distance=numbers) if kind == "distance" else numbers)

        of_all, arguments = jax.value_and_grad(of_bias, argnums=(0, 1)), differentiated
    expected = of_all(*arguments)
    small_blocks(monkeypatch)
    found = of_all(*arguments)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.03, "atol": 0.1}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), **close
        ),
        found,
        expected,
    )


def test_gradients_of_many_blocks_are_added_up_in_float32(few_scores):
    """In bfloat16, what a block adds to the sum of 300 others would be lost."""
    query, key_value = parts(1, 1, 1, 900, 3, 4, jnp.bfloat16)

    def loss(value):
        bias = jnp.zeros((1, 1, 1, 3))
        found = attend(query, KeyValue(key_value.key, value), bias, 0.0)
        return jnp.sum(found.astype(jnp.float32))

    gradient = jax.grad(loss)(key_value.value)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), 300.0, rtol=0.01)


FAMILIES = {
    "t5": small.t5_config(num_encoder_layers=2),
    "gpt2": GPT2Config(small.VOCABULARY, 16, 2, 32, 2, max_positions=64, dropout_rate=0.0),
    "gpt_neox": GPTNeoXConfig(small.VOCABULARY, 16, 2, 32, 2, rotary=Rotary(4)),
    "llama": LlamaConfig(
        vocab_size=small.VOCABULARY,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        head_width=4,
        feed_forward_width=32,
        num_layers=3,
        rotary=Rotary(4),
        sliding_window=6,
        window_pattern="sfs",
    ),
}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *(("t5", how) for how in ("plain", "remat", "scan_layers")),
        *(("llama", how) for how in ("plain", "remat", "scan_layers")),
        ("gpt2", "plain"),
        ("gpt_neox", "plain"),
    ],
)
def test_models_of_all_families_read_long_prompts(monkeypatch, family, how):
    config = FAMILIES[family]
    if how != "plain":
        config = dataclasses.replace(config, **{how: True})
    model = make_module(config)
    prompt = jax.random.randint(jax.random.key(0), (2, 37), 3, small.VOCABULARY)
    response = jax.random.randint(jax.random.key(1), (2, 11), 3, small.VOCABULARY)
    mask = jnp.arange(37)[None] >= jnp.asarray([[0], [9]])
    own = make_module(FAMILIES[family])
    params = own.init(
        jax.random.key(2), *((prompt, mask, response) if family == "t5" else (prompt, mask))
    )
    params = small.random_like(params["params"])
    params = stack_layers(params) if how == "scan_layers" else params

    def loss(params):
        encoded = model.apply({"params": params}, prompt, method="embed")
        encoded = model.apply({"params": params}, encoded, mask, method="encode")
        logits = model.apply({"params": params}, encoded, mask, response, method=small.score)
        return jnp.mean(jax.nn.log_softmax(logits) ** 2), logits

    def found():
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, expected), expected_gradient = found()
    small_blocks(monkeypatch, 128, 8, 11)
    jax.clear_caches()
    (_, logits), gradient = found()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
        gradient,
        expected_gradient,
    )


def test_no_array_has_the_square_of_the_length():
    """Of the program's arrays, with its gradient, none is as large as scores would be."""
    length = 4096
    query, key_value = parts(1, 2, 1, length, length, 8)
    bias = CausalBias(jnp.ones((1, length), bool), jnp.arange(length)[None], 700)

    def loss(query, key_value):
        return attend(query, key_value, bias, SCALE).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(query, key_value).compile()
    # Those of a block: scores, their bias, weights and gradients.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * length * length * 4


def check_kernel(mesh, groups, length, window=None):
    mask = jnp.arange(length)[None] >= jnp.asarray([[0], [100]])
    query, key_value = parts(2, 4, groups, length, length, 128)
    bias = CausalBias(mask, token_positions(mask), window)
    assert bias.is_gapless()
    weights = normal(2, length, 4 * 128, seed=6) * mask[:, :, None]

    def loss(of):
        def one(query, key_value):
            found = of(query, key_value)
            return jnp.sum(found * weights), found * mask[:, :, None]

        return jax.value_and_grad(one, argnums=(0, 1), has_aux=True)

    whole = bias.block(0, length, 0, length)
    expected = loss(lambda query, key_value: attend(query, key_value, whole, SCALE))
    kernel = loss(
        lambda query, key_value: attention.by_kernel(query, key_value, bias, SCALE, interpret=True)
    )
    with jax.set_mesh(mesh):
        assert attention._has_kernel(query, key_value, bias)
        found = jax.jit(kernel)(query, key_value)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3),
        found,
        jax.jit(expected)(query, key_value),
    )


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_kernel_is_attention_at_what_is_real(mesh, groups):
    check_kernel(small.mesh_of(*mesh), groups, length=256)


@pytest.mark.parametrize("window", [1, 40, 300])
def test_the_kernel_has_windows(window):
    check_kernel(small.mesh_of(1, 1, 1), groups=2, length=256, window=window)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_padding_between_real_positions_is_found(rows):
    mask = jnp.asarray(rows)
    texts = ["".join(" x"[real] for real in row).strip() for row in rows]
    bias = CausalBias(mask, token_positions(mask), 3)
    assert bias.is_gapless() == (not any(" " in text for text in texts))


def test_on_a_tpu_the_kernel_takes_windows_that_no_padding_interrupts(few_scores):
    """Both ways are in the program: what padding there is, only the data say."""
    query, key_value = parts(1, 2, 1, 128, 128, 128)

    def run(query, key_value, mask):
        return attend(query, key_value, CausalBias(mask, token_positions(mask), 5), SCALE)

    traced = jax.jit(run).trace(query, key_value, jnp.ones((1, 128), bool))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    assert "stablehlo.case" in text
    assert "stablehlo.while" in text
