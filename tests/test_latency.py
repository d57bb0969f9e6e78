"""The stopwatch: its parts add up, and are those of the program that generation runs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from l2s_jax.decoding.engine import GREEDY, prefill
from l2s_jax.decoding.loop import decoding_steps
from l2s_jax.evaluation.latency import Stopwatch
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel
from l2s_jax.settings.search import Search

SHAPE = {"batch_size": 2, "prompt_tokens": 6, "new_tokens": 10}


@pytest.fixture(scope="module")
def system():
    return LanguageModel("slm", GEOMETRIES["tiny"])


@pytest.fixture(scope="module")
def trained(system):
    return jax.jit(system.init)(jax.random.key(0))


@pytest.mark.parametrize("search", [GREEDY, Search(num_beams=2)], ids=["greedy", "beams"])
def test_the_parts_add_up_to_the_whole(system, trained, search):
    watch = Stopwatch(system, trained, {}, 100, search=search, **SHAPE)
    times = watch.measure()
    steps = 9 if search.num_beams > 1 else decoding_steps(10)
    parts = times["encode_ms"] + times["prefill_ms"] + steps * times["decode_ms_per_token"]
    assert parts >= times["total_ms"] * (1 - 1e-9)
    if min(times.values()) > 0:  # a part below zero counts as nothing
        assert parts == pytest.approx(times["total_ms"])
    # One program gives the first token, and all of them, whatever the tokens are.
    one, all_of_them = (np.asarray(run().lengths) for run in (watch._first, watch._whole))
    assert (one == 1).all() and (all_of_them == 10).all()


def test_the_cache_has_the_size_that_prefill_gives_it(system, trained):
    watch = Stopwatch(system, trained, {}, 100, **SHAPE)
    ids, mask = np.ones((2, 6), np.int32), np.ones((2, 6), bool)
    hidden = system.encode(trained, {}, ids, mask)
    _, cache, _ = prefill(system, trained, {}, ids, mask, hidden, max_new_tokens=10)
    assert watch.cache_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
