"""Rows at places of their own that take turns at the slots of a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import CAUSAL, COMPILATION, case, computations_per_token, made_by

from l2s_jax.decoding import slots
from l2s_jax.decoding.choices import choices_of
from l2s_jax.models.cache import taking_turns, turned_to
from l2s_jax.models.systems import LanguageModel
from l2s_jax.settings.search import Search

ROWS, PROMPT = 3, 7


def system_of(name):
    if name == "windows":
        system = LanguageModel("slm", dataclasses.replace(CAUSAL["llama"], sliding_window=4))
        return system, system.init(jax.random.key(0)), {}
    return case(name)[:3]


def prefilled(name, steps):
    """(a system, its parameters, the cache of prompts of several lengths)."""
    system, trained, frozen = system_of(name)
    chance = np.random.default_rng(0)
    ids = chance.integers(2, 20, (ROWS, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT) < np.array([[7], [4], [2]])
    hidden = system.encode(trained, frozen, ids, mask)
    return system, trained, system.prefill(trained, frozen, ids, mask, hidden, steps)[1]


@pytest.mark.parametrize("begun", [0, 2, 5])
@pytest.mark.parametrize("name", ["slm", "cross", "windows", *CAUSAL])
def test_whatever_the_slot_the_logits_are_those_of_a_tokens_place(name, begun):
    """`begun` tokens are there when the rows begin to take turns, anywhere in the cache."""
    steps = 9
    system, trained, cache = prefilled(name, steps)
    tokens = np.random.default_rng(1).integers(2, 20, (steps, ROWS)).astype(np.int32)
    step = jax.jit(system.step)
    for token in tokens[:begun]:
        _, cache = step(trained, token, cache)
    for turn in range(cache.slots):
        plain, turning = cache, turned_to(taking_turns(cache, cache.slots), jnp.int32(turn))
        for token in tokens[begun:]:
            expected, plain = step(trained, token, plain)
            found, turning = step(trained, token, turning)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert int(turning.turn) == (turn + steps - begun) % cache.slots


def test_what_a_row_of_before_left_is_not_seen():
    system, trained, cache = prefilled("slm", steps=4)
    turning = taking_turns(cache, 4)
    assert turning.slots == 4
    step = jax.jit(system.step)
    for token in range(2, 2 + 3 * turning.slots):  # a new row after each 4 tokens
        again = token % 4 == 2
        if again:
            plain = cache
            turning = turning.replace(index=jnp.zeros_like(turning.index))
            plain = plain.replace(index=jnp.zeros_like(plain.index))
        row = jnp.full(ROWS, 2 + token % 4, jnp.int32)
        expected, plain = step(trained, row, plain)
        found, turning = step(trained, row, turning)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_several_tokens_at_once_are_refused():
    system, trained, cache = prefilled("slm", steps=4)
    with pytest.raises(ValueError, match="2 tokens at once: expected 1"):
        system.extend(trained, jnp.zeros((ROWS, 2), jnp.int32), taking_turns(cache, 4))


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", ["slm", "add", *CAUSAL])
def test_one_slot_of_the_cache_is_written_in_place(name, rows):
    capacity = 500
    system, trained, frozen = system_of(name)
    loop = slots.SlotLoop(system, (system.decoder.eos_id,), capacity, Search())
    prompts = jnp.zeros((rows, PROMPT), jnp.int32), jnp.ones((rows, PROMPT), bool)
    given = (
        *prompts, jnp.full(rows, capacity), jnp.zeros(rows, jnp.uint32),
        choices_of([Search()] * rows), jnp.zeros(rows, bool),
    )  # fmt: skip
    state = jax.eval_shape(
        lambda *given: slots.read(loop, trained, frozen, *given, prompt_slots=PROMPT), *given
    )
    assert state.rows.cache.slots == capacity
    number = jnp.int32(8)
    lowered = slots.advance.lower(
        loop, trained, frozen, state, jnp.zeros(rows, bool), number, number
    )
    compiled = lowered.compile(COMPILATION)
    cache = jax.tree.leaves(state.rows.cache)
    shapes = {leaf.shape for leaf in cache if leaf.ndim == 4 and leaf.shape[2] > PROMPT}
    turned = {(*shape[:2], *shape[:1:-1]) for shape in shapes}
    lines = computations_per_token(compiled.as_text())
    assert made_by("dynamic-update-slice", shapes, lines)
    assert not made_by("scatter", shapes, lines)
    assert not made_by("copy", shapes | turned, lines)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
    assert compiled.memory_analysis().alias_size_in_bytes >= held
