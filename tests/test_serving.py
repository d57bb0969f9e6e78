"""Parameters as generation holds them give what the parameters themselves give."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import small

from l2s_jax.decoding.engine import decode_cache, prefill
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.serving import to_serve
from l2s_jax.models.systems import LanguageModel

SYSTEMS = ("llm", "add", "cross", "tied", "causal")
NEW = 6


def make_system(name, dtype=jnp.float32):
    if name == "tied":
        return LanguageModel("slm", small.t5_config(tied_head=True, dtype=dtype))
    if name == "causal":
        config = GPT2Config(
            vocab_size=small.VOCABULARY,
            width=16,
            num_heads=2,
            feed_forward_width=32,
            num_layers=2,
            max_positions=64,
            dropout_rate=0.0,
            dtype=dtype,
        )
        return LanguageModel("slm", config)
    return small.make_system(name, dtype=dtype)


@functools.partial(jax.jit, static_argnums=0)
def run(system, trained, frozen, ids, mask):
    """H, the first token's logits, the tokens."""
    settings = {"max_new_tokens": NEW}
    hidden = system.encode(trained, frozen, ids, mask)
    logits, cache, _ = prefill(system, trained, frozen, ids, mask, hidden, **settings)
    limits = jnp.full(len(ids), NEW)
    decoded = decode_cache(system, trained, logits, cache, limits, end_ids=(), **settings)
    return hidden, logits, decoded.tokens


def case(name, dtype=jnp.float32):
    system = make_system(name, dtype)
    batch = small.make_batch(system, rows=5)
    inputs = tuple(jnp.asarray(batch[f"{system.prompt_name}_{part}"]) for part in ("ids", "mask"))
    return system, *small.make_params(system), inputs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SYSTEMS)
def test_float_weights_give_the_same_and_are_not_cast(name, dtype):
    system, trained, frozen, inputs = case(name, dtype)
    held = jax.device_put(system.to_serve(trained, frozen, "float"))
    if name in ("tied", "causal"):
        # What embeds a token is rounded as what makes its logit.
        table = trained["slm"]["token_embedding"]["embedding"].astype(dtype).astype(jnp.float32)
        trained = {"slm": {**trained["slm"], "token_embedding": {"embedding": table}}}
    expected = run(system, trained, frozen, *inputs)
    for found, wanted in zip(run(system, *held, *inputs), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    text = run.lower(system, *held, *inputs).as_text()
    casts = r"convert.*\(tensor<(\d+x(32|6)|48x16)xf32>\) -> tensor<\d+x\d+xbf16>"
    assert not re.search(casts, text)


@pytest.mark.parametrize("name", SYSTEMS)
def test_int8_weights_are_products_with_what_they_stand_for(name):
    system, trained, frozen, inputs = case(name)
    held = jax.device_put(system.to_serve(trained, frozen, "int8"))

    def is_quantized(leaf):
        return isinstance(leaf, qwix.QArray)

    leaves = jax.tree.leaves(held, is_leaf=is_quantized)
    assert any(map(is_quantized, leaves))
    meant = jax.tree.map(
        lambda leaf: (
            np.asarray(leaf.qvalue, np.float32) * np.asarray(leaf.scale)
            if is_quantized(leaf)
            else leaf
        ),
        held,
        is_leaf=is_quantized,
    )
    hidden, logits, tokens = run(system, *held, *inputs)
    wanted_hidden, wanted_logits, wanted_tokens = run(system, *meant, *inputs)
    np.testing.assert_allclose(hidden, wanted_hidden, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(tokens, wanted_tokens)
    # And they stand for nearly the weights that were given.
    exact = run(system, trained, frozen, *inputs)[1]
    scale = np.abs(exact).max()
    assert 0 < np.abs(logits - exact).max() < 0.05 * scale


@pytest.mark.parametrize("name", SYSTEMS)
def test_int8_keeps_what_products_do_not_read_and_what_joins(name):
    system, trained, frozen, _ = case(name)
    held, held_frozen = system.to_serve(trained, frozen, "int8")

    def paths(tree):
        leaves = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray)
        )
        return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}

    for path, leaf in {**paths(held), **paths(held_frozen)}.items():
        tied = name in ("tied", "causal") and path.endswith("token_embedding/embedding")
        joins = path.startswith(("projector", "prompt_map"))
        expected = tied or (path.endswith("kernel") and not joins)
        assert isinstance(leaf, qwix.QArray) == expected, path
        if expected:
            outputs = leaf.shape[0] if tied else leaf.shape[1]
            assert leaf.qvalue.dtype == jnp.int8 and leaf.scale.size == outputs


def test_only_known_weights():
    config = small.t5_config()
    with pytest.raises(ValueError, match="weights='int4': expected one of float, int8"):
        to_serve(small.t5_params(config), dataclasses.replace(config), "int4")
