"""LLM and SLM of every family together: each pair learns 32 examples by heart and says them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from l2s_jax.checkpoints.pretrained import family_of
from l2s_jax.cluster import paths, sharding
from l2s_jax.decoding.engine import jitted_decode
from l2s_jax.models.families import make_module
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.models.t5 import T5Config
from l2s_jax.training import optim
from l2s_jax.training.update import batch_loss, init_state, train_step

ROWS, PROMPT, RESPONSE, STEPS = 32, 9, 6, 250
# More than the LLM's: the SLM's vocabulary is another one.
OWN_VOCABULARY = 60


def model(family, vocab_size, width, **changes):
    """A config of one layer (two in an LLM)."""
    shared = {
        "vocab_size": vocab_size,
        "width": width,
        "num_heads": 4,
        "feed_forward_width": 2 * width,
        "dropout_rate": 0.0,
        "pad_id": 0,
        "eos_id": 1,
    }
    if family == "t5":
        layers = changes.pop("num_layers", 1)
        return T5Config(
            **shared,
            head_width=8,
            num_encoder_layers=layers,
            num_decoder_layers=layers,
            num_buckets=8,
            max_distance=16,
            **changes,
        )
    shared["num_layers"] = changes.pop("num_layers", 1)
    if family == "gpt2":
        return GPT2Config(**shared, max_positions=32)
    if family == "gpt_neox":
        return GPTNeoXConfig(**shared, rotary=Rotary(width // 8))
    return LlamaConfig(**shared, num_kv_heads=2, head_width=8, rotary=Rotary(8))


# (LLM's family, SLM's family, fusion); all but the first have two vocabularies.
PAIRS = [
    ("t5", "t5", "add", True),
    ("t5", "t5", "replace", False),
    ("t5", "t5", "cross", False),
    ("t5", "gpt2", "add", False),
    ("t5", "gpt2", "replace", False),
    ("t5", "gpt_neox", "add", False),
    ("t5", "gpt_neox", "replace", False),
    ("t5", "llama", "add", False),
    ("t5", "llama", "replace", True),
    ("llama", "gpt2", "add", False),
    ("llama", "llama", "add", False),
    ("llama", "llama", "replace", False),
    ("gpt2", "t5", "add", False),
]
IDS = ["-".join(pair[:3]) + ("-shared" if pair[3] else "") for pair in PAIRS]


@functools.cache
def make(pair):
    """(system, trained, frozen), random."""
    llm_family, slm_family, fusion, shared = pair
    llm = model(llm_family, small.VOCABULARY, 40, num_layers=2)
    slm = model(slm_family, small.VOCABULARY if shared else OWN_VOCABULARY, 32)
    encoder, kept = family_of(llm).encoder_parameters(llm, 1 if llm_family != "t5" else 0)
    whole = jax.jit(LanguageModel("llm", llm).init)(jax.random.key(1))["llm"]
    frozen = {name: whole[name] for name in whole if f"{name}/".startswith(kept)}
    system = LlmToSlm(encoder, slm, 48, fusion=fusion, shared_vocabulary=shared)
    return system, jax.jit(system.init)(jax.random.key(0)), frozen


def examples(system):
    """A batch of different prompts with unrelated responses of one to RESPONSE tokens and eos."""
    random = np.random.default_rng(0)

    def side(name, tokens, vocab_size, eos):
        lengths = random.integers(2, tokens + 1, ROWS)
        mask = np.arange(tokens) < lengths[:, None]
        ids = random.integers(3, vocab_size, (ROWS, tokens), dtype=np.int32)
        if eos:
            ids[np.arange(ROWS), lengths - 1] = 1
        return {f"{name}_ids": np.where(mask, ids, 0).astype(np.int32), f"{name}_mask": mask}

    vocab_size = system.slm_config.vocab_size
    return side("llm", PROMPT, small.VOCABULARY, False) | side(
        "response", RESPONSE, vocab_size, True
    )


@functools.cache
def learned(pair):
    """(parameters, loss of each step) after STEPS steps on all examples at once."""
    system, trained, frozen = make(pair)
    config = small.make_train_config(
        STEPS, batch_size=ROWS, learning_rate=1e-2, parameter_scale=False, schedule="cosine"
    )
    optimizer = optim.optimizer(config, trained)

    @jax.jit
    def run(trained, frozen, batch):
        def step(state, _):
            state, metrics = train_step(
                state, frozen, batch, system=system, optimizer=optimizer, config=config, seed=0
            )
            return state, metrics["loss"]

        state = init_state(trained, optimizer, config)
        state, losses = jax.lax.scan(step, state, length=STEPS)
        return state.params, losses

    return jax.device_get(run(trained, frozen, examples(system)))


def decode(pair, ids, mask):
    system, _, frozen = make(pair)
    limits = np.full(len(ids), RESPONSE)
    return jax.device_get(
        jitted_decode(system, learned(pair)[0], frozen, ids, mask, limits, max_new_tokens=RESPONSE)
    )


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_a_pair_learns_and_says_its_examples(pair):
    system, trained, _ = make(pair)
    params, losses = learned(pair)
    assert losses[0] > 2 and losses[-1] < 0.05
    assert "llm" not in params and set(params) == set(trained)

    batch = examples(system)
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    decoded = decode(pair, ids, mask)
    np.testing.assert_array_equal(decoded.tokens, batch["response_ids"])
    np.testing.assert_array_equal(decoded.lengths, batch["response_mask"].sum(1))
    assert decoded.finished.all()

    # Neither padding nor the other rows change what is said.
    wider = [np.pad(x[3:8], ((0, 0), (0, 7))) for x in (ids, mask)]
    np.testing.assert_array_equal(decode(pair, *wider).tokens, decoded.tokens[3:8])


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_every_trained_parameter_has_a_gradient_and_the_llm_has_none(pair):
    system, trained, frozen = make(pair)
    batch = examples(system)

    @jax.jit
    @jax.grad
    def gradient(trained, frozen):
        return batch_loss(system, trained, frozen, batch, None, 0.0)[0]

    grads = gradient(learned(pair)[0], frozen)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    unused = {"token_embedding"} if pair[1] == "t5" else set()  # cross and replace have no E_X
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = paths.path_name(path)
        assert np.isfinite(leaf).all(), name
        # A softmax does not see what is added to all of its inputs, as a key's bias is.
        if not name.endswith("key/bias") and not unused & set(name.split("/")):
            assert np.abs(leaf).max() > 0, name


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_the_control_fails(pair):
    system, _, frozen = make(pair)
    batch = examples(system)
    mismatched = jax.device_get(
        jitted_decode(
            system,
            learned(pair)[0],
            frozen,
            batch["llm_ids"],
            batch["llm_mask"],
            np.full(ROWS, RESPONSE),
            max_new_tokens=RESPONSE,
            mismatched=True,
        )
    )
    same = (mismatched.tokens == batch["response_ids"]).all(1).mean()
    assert same < (1.0 if pair[2] == "add" else 0.3)


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_every_parameter_has_one_sharding_rule(pair):
    system, trained, frozen = make(pair)
    mesh = small.mesh_of()
    sharding.parameter_shardings(trained, mesh)
    sharding.parameter_shardings(frozen, mesh)
    for name, config in (("llm", system.llm_config), ("slm", system.slm_config)):
        params = jax.eval_shape(LanguageModel(name, config).init, jax.random.key(0))
        sharding.parameter_shardings(params, mesh)


@pytest.mark.parametrize("family", ["t5", "gpt2", "gpt_neox", "llama"])
def test_parameters_read_per_step_are_those_that_the_step_uses(family):
    config = model(family, 48, 32, num_layers=2)
    module = make_module(config)
    params = family_of(config).abstract_params(module)

    def first(params):
        hidden = jnp.zeros((1, 3, 32))
        return module.apply({"params": params}, hidden, jnp.ones((1, 3), bool), 4, method="prefill")

    _, cache = jax.eval_shape(first, params)
    jaxpr = jax.make_jaxpr(
        lambda params, token, cache: module.apply({"params": params}, token, cache, method="step")
    )(params, jax.ShapeDtypeStruct((1,), jnp.int32), cache).jaxpr
    used = {str(v) for equation in jaxpr.eqns for v in equation.invars}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    read = {
        paths.path_name(path): leaf.size
        for (path, leaf), variable in zip(leaves, jaxpr.invars, strict=False)
        if str(variable) in used
    }
    rows = {"position_embedding/embedding"}
    if not config.tied_head:
        rows.add("token_embedding/embedding")
    total = sum(size for name, size in read.items() if name not in rows)
    assert module.parameters_read_per_step(params) == total


def test_cross_needs_cross_attention():
    system = LlmToSlm(model("t5", 48, 40), model("gpt2", 48, 32), 8, fusion="cross")
    with pytest.raises(ValueError, match="'cross': a GPT2 has no cross-attention"):
        jax.eval_shape(system.init, jax.random.key(0))
