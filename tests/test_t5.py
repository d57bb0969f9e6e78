"""T5: causality, padding, dtypes, sizes. That it is T5 is for test_t5_parity.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import Literal

from l2s_jax.models.systems import parameter_count
from l2s_jax.models.t5 import T5, T5Config

SMALL = T5Config()
LARGE = T5Config(
    width=1024,
    num_heads=16,
    feed_forward_width=4096,
    num_encoder_layers=24,
    num_decoder_layers=24,
)
# v1.1: feed-forward width 1024, gated, a head of its own; 6 heads and 8 layers.
V1_1_SMALL = T5Config(
    num_heads=6,
    feed_forward_width=1024,
    num_encoder_layers=8,
    num_decoder_layers=8,
    activation="gated_gelu",
    tied_head=False,
)


def abstract_params(config):
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    return jax.eval_shape(lambda: T5(config).init(jax.random.key(0), ids, mask, ids)["params"])


def test_decoder_is_causal_by_gradient():
    config = small.t5_config(num_decoder_layers=2)
    params = small.t5_params(config)
    prompt, response = np.arange(10, 16)[None], np.arange(20, 29)[None]

    def logits(embedding):
        changed = {**params, "token_embedding": {"embedding": embedding}}
        mask = np.ones(prompt.shape, bool)
        return T5(config).apply({"params": changed}, prompt, mask, response)[0].sum(-1)

    # Every token occurs once, so a row of the embedding stands for a position.
    gradient = jax.jit(jax.jacrev(logits))(params["token_embedding"]["embedding"])
    influence = np.abs(gradient).max(-1)
    of_response, of_prompt = influence[:, 20:29], influence[:, 10:16]
    later = np.triu(np.ones((9, 9), bool), 1)
    assert (of_response[later] == 0).all()
    assert (of_response[~later] > 0).all()
    assert (of_prompt > 0).all()


PADDED = 20


@functools.cache
def padding_case():
    config = small.t5_config(num_encoder_layers=2)
    params = small.t5_params(config)
    random = np.random.default_rng(3)
    prompt = random.integers(3, small.VOCABULARY, PADDED, dtype=np.int32)
    response = random.integers(3, small.VOCABULARY, (1, 5), dtype=np.int32)
    model = T5(config)

    @jax.jit
    def run(ids, mask):
        variables = {"params": params}
        hidden = model.apply(
            variables, model.apply(variables, ids, method="embed"), mask, method="encode"
        )
        return hidden, model.apply(variables, ids, mask, response)

    return prompt, run


@functools.cache
def unpadded(length):
    prompt, run = padding_case()
    return run(prompt[None, :length], np.ones((1, length), bool))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_encoder_and_logits_do_not_depend_on_padding(data):
    length = data.draw(st.sampled_from([1, 4, 11]), "length")
    before = data.draw(st.integers(0, PADDED - length), "padding before the prompt")
    filler = data.draw(st.integers(0, small.VOCABULARY - 1), "id of the padding")
    prompt, run = padding_case()
    here = slice(before, before + length)
    ids = np.full((1, PADDED), filler, np.int32)
    mask = np.zeros((1, PADDED), bool)
    ids[0, here], mask[0, here] = prompt[:length], True
    hidden, logits = run(ids, mask)
    expected_hidden, expected_logits = unpadded(length)
    np.testing.assert_allclose(hidden[:, here], expected_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("tied_head", [True, False])
def test_bfloat16_keeps_norms_softmax_and_logits_in_float32(tied_head):
    config = small.t5_config(dtype=jnp.bfloat16, tied_head=tied_head, activation="gated_gelu")
    params = small.t5_params(config)
    system = small.LanguageModel("slm", config)
    batch = small.make_batch(system)

    def run(config, params):
        return small.LanguageModel("slm", config).scored({"slm": params}, {}, batch).logits()

    logits = jax.jit(run, static_argnums=0)(config, params)
    exact = jax.jit(run, static_argnums=0)(dataclasses.replace(config, dtype=jnp.float32), params)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05

    dtypes = {"rsqrt": set(), "exp": set()}
    operands, results = set(), set()
    for equation in equations(jax.make_jaxpr(run, static_argnums=0)(config, params).jaxpr):
        name = equation.primitive.name
        if name in dtypes:
            dtypes[name].add(equation.invars[0].aval.dtype.name)
        if name == "dot_general":
            operands |= {v.aval.dtype.name for v in equation.invars}
            if equation.outvars[0].aval.shape[-1] == small.VOCABULARY:
                results.add(equation.outvars[0].aval.dtype.name)
    assert dtypes == {"rsqrt": {"float32"}, "exp": {"float32"}}
    assert operands == {"bfloat16"}
    assert results == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(config))} == {"float32"}


def test_bfloat16_decodes_with_a_bfloat16_cache():
    config = small.t5_config(dtype=jnp.bfloat16)
    params = small.t5_params(config)
    system = small.LanguageModel("slm", config)
    batch = small.make_batch(system)
    ids, mask = batch["slm_prompt_ids"], batch["slm_prompt_mask"]

    @jax.jit
    def run(trained):
        hidden = system.encode(trained, {}, ids, mask)
        _, cache = system.prefill(trained, {}, ids, mask, hidden, 4)
        return hidden, system.step(trained, jnp.zeros(len(ids), jnp.int32), cache)

    hidden, (logits, cache) = run({"slm": params})
    assert hidden.dtype == logits.dtype == jnp.float32
    for key_value in (*cache.self_attention, *cache.cross_attention):
        assert key_value.key.dtype == key_value.value.dtype == jnp.bfloat16


def test_float16_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="float16: T5 overflows"):
        T5Config(dtype=jnp.float16)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"'swish': expected one of \['gated_gelu'"):
        T5Config(activation="swish")


@pytest.mark.parametrize(
    ("config", "count"), [(SMALL, 60_506_624), (LARGE, 737_668_096), (V1_1_SMALL, 76_961_152)]
)
def test_full_size_parameter_counts(config, count):
    assert parameter_count(abstract_params(config)) == count


def read_by_step(config, params):
    """Sizes of the parameters that the jaxpr of one step has as operands, by path."""
    system = small.LanguageModel("slm", config)
    ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)

    def make_cache(params):
        hidden = system.encode({"slm": params}, {}, ids, mask)
        return system.prefill({"slm": params}, {}, ids, mask, hidden, 4)[1]

    cache = jax.eval_shape(make_cache, params)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = lambda params, token, cache: system.step({"slm": params}, token, cache)  # noqa: E731
    jaxpr = jax.make_jaxpr(step)(params, token, cache).jaxpr
    used = {v for equation in jaxpr.eqns for v in equation.invars if not isinstance(v, Literal)}
    named = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for (path, leaf), variable in zip(named, jaxpr.invars, strict=False)
        if variable in used
    }


@pytest.mark.parametrize(
    "config",
    [SMALL, V1_1_SMALL, LARGE, small.t5_config(num_decoder_layers=3)],
    ids=["small", "v1.1 small", "large", "own"],
)
def test_parameters_read_per_step_are_those_that_the_step_uses(config):
    params = abstract_params(config)
    used = read_by_step(config, params)
    if not config.tied_head:
        del used["token_embedding/embedding"]  # read, but only one row of it
    assert T5(config).parameters_read_per_step(params) == sum(used.values())
    assert not any(name.startswith("encoder/") for name in used)
    assert 0 < sum(used.values()) < parameter_count(params)
