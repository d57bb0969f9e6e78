"""Operations of a training step, against sums done by hand and the compiler's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from l2s_jax.models.lora import Lora
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.training import optim, update
from l2s_jax.training.flops import training_flops

ROWS, PROMPT, RESPONSE = 4, 7, 5


def test_a_product_counts_for_each_factor_that_needs_a_gradient():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
    once = 2 * 2 * 3 * 5
    both = {"a": a, "b": b}
    loss = lambda p: jnp.sum(p["a"] @ p["b"])  # noqa: E731
    assert training_flops(loss, both, None) == 3 * once
    assert training_flops(loss, both, {"a": True, "b": False}) == 2 * once
    assert training_flops(loss, both, {"a": False, "b": False}) == once
    assert training_flops(lambda p, x: jnp.sum(x @ p), b, None, a) == 2 * once


def test_loops_calls_and_branches_are_looked_into():
    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    once = 2 * 2 * 4 * 4

    def layers(w, x):
        # The carry depends on w from the second turn on.
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.matmul)(x, w), None), x, length=6)[0]

    assert training_flops(lambda w, x: layers(w, x).sum(), w, None, x) == 6 * 3 * once

    def branch(w, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w).sum()

    assert training_flops(branch, w, None, x) == (2 + 3) * once


def by_hand(system):
    """Of a T5 with ReLU, in ROWS batches of PROMPT and RESPONSE tokens."""

    def attention(c, queries, keys, own):
        inner = c.num_heads * c.head_width
        projections = 2 * queries * c.width * inner + 2 * keys * c.width * inner * own
        return 2 * projections + 2 * 2 * queries * keys * inner

    def encoder(c):
        feed = 2 * 2 * PROMPT * c.width * c.feed_forward_width
        return c.num_encoder_layers * (attention(c, PROMPT, PROMPT, 1) + feed)

    def decoder(c):
        feed = 2 * 2 * RESPONSE * c.width * c.feed_forward_width
        both = attention(c, RESPONSE, RESPONSE, 1) + attention(c, RESPONSE, PROMPT, 1)
        return c.num_decoder_layers * (both + feed) + 2 * RESPONSE * c.width * c.vocab_size

    if not isinstance(system, LlmToSlm):
        return 3 * ROWS * (encoder(system.config) + decoder(system.config))
    width, llm = system.slm_config.width, system.llm_config
    inward = 2 * PROMPT * llm.width * system.projector_width
    outward = 2 * PROMPT * system.projector_width * width
    trained = encoder(system.slm_config) + decoder(system.slm_config) + outward
    # H is given, so that the projector's first layer has no gradient for its input.
    return ROWS * (encoder(llm) + 2 * inward + 3 * trained)


@pytest.mark.parametrize("name", ["slm", "add"])
def test_a_training_step(name):
    system = small.make_system(name)
    params, frozen = small.make_params(system)
    batch = small.make_batch(system, ROWS, PROMPT, RESPONSE)
    config = small.make_train_config(1)
    found = update.step_flops(system, params, frozen, batch, config)
    assert found == by_hand(system)

    # XLA counts also what is no product: a little more here, little beside it in a real model.
    step = update.make_step(
        system,
        optim.optimizer(config, params),
        config,
        0,
        update.state_shardings(params, optim.optimizer(config, params), config, small.mesh_of()),
    )
    state = update.init_state(params, optim.optimizer(config, params), config)
    counted = step.lower(state, frozen, batch).cost_analysis()["flops"]
    assert found < counted < 3 * found


def test_what_is_not_trained_counts_less():
    system = small.make_system("slm")
    params, _ = small.make_params(system)
    batch = small.make_batch(system, ROWS, PROMPT, RESPONSE)
    whole = update.step_flops(system, params, {}, batch, small.make_train_config(1))
    head = small.make_train_config(1, trainable=(".*/head/kernel",))
    c = system.config
    forward = whole / 3
    of_head = ROWS * 2 * RESPONSE * c.width * c.vocab_size
    # Only the head's own gradient: its input depends on nothing that is trained.
    assert update.step_flops(system, params, {}, batch, head) == pytest.approx(forward + of_head)

    lora = Lora(system, rank=2, alpha=1.0, pattern=".*(query|value)/kernel")
    adapters, base = lora.split(params, jax.random.key(0))
    frozen = {"base": base, "inner": {}}
    found = update.step_flops(lora, adapters, frozen, batch, small.make_train_config(1))
    assert forward < found < whole
    assert np.isfinite(found)
