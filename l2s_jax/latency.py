"""How long one system takes for one batch, part by part, on random prompts of one length."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from l2s_jax import sharding
from l2s_jax.data.prompts import random_prompts
from l2s_jax.decoding.engine import GREEDY, decode, decode_cache, prefill
from l2s_jax.decoding.loop import decoding_steps
from l2s_jax.decoding.search import Search
from l2s_jax.models.systems import Params, System


class Stopwatch:
    """The compiled programs of one system at one shape.

    compile_s is the time that the whole program, from prompt to response, took to compile.
    cache_bytes is the size of the cache that a decoding step reads.
    """

    def __init__(
        self,
        system: System,
        trained: Params,
        frozen: Params,
        vocab_size: int,
        *,
        batch_size: int,
        prompt_tokens: int,
        new_tokens: int,
        search: Search = GREEDY,
        mesh: Mesh | None = None,
    ):
        """`vocab_size` is that of the prompts. Compiles, and runs everything twice to warm up.

        On a mesh, where the parameters must be, rows are added up to a number that it splits, as
        generation does. All processes of the mesh measure together. None is one device.
        """
        mesh = mesh or sharding.one_device()
        rows = -(-batch_size // sharding.batch_ways(mesh)) * sharding.batch_ways(mesh)
        prompts = random_prompts(rows, prompt_tokens, vocab_size)
        limits = np.where(np.arange(rows) < batch_size, new_tokens, 0).astype(np.int32)
        ids, mask, limits, seeds = sharding.put(
            (prompts, np.ones(prompts.shape, bool), limits, np.arange(rows, dtype=np.uint32)),
            sharding.batch_sharding(mesh),
        )
        settings = {"max_new_tokens": new_tokens, "search": search}
        self._steps = max(new_tokens - 1 if search.num_beams > 1 else decoding_steps(new_tokens), 1)

        encode = _compiled(mesh, system.encode, trained, frozen, ids, mask)
        hidden = encode(trained, frozen, ids, mask)
        start = _compiled(
            mesh,
            lambda trained, frozen, ids, mask, hidden: prefill(
                system, trained, frozen, ids, mask, hidden, **settings
            ),
            *(trained, frozen, ids, mask, hidden),
        )
        first = start(trained, frozen, ids, mask, hidden)
        loop = _compiled(
            mesh,
            lambda trained, first, limits, seeds: decode_cache(
                system, trained, *first[:2], limits, seeds, first[2], ignore_eos=True, **settings
            ),
            *(trained, first, limits, seeds),
        )
        began = time.perf_counter()
        whole = _compiled(
            mesh,
            lambda *arguments: decode(system, *arguments, ignore_eos=True, **settings),
            *(trained, frozen, ids, mask, limits, seeds),
        )
        self.compile_s = time.perf_counter() - began
        self.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first[1]))
        self._encode = lambda: encode(trained, frozen, ids, mask)
        self._prefill = lambda hidden: start(trained, frozen, ids, mask, hidden)
        self._loop = lambda first: loop(trained, first, limits, seeds)
        self._whole = lambda: whole(trained, frozen, ids, mask, limits, seeds)
        for _ in range(2):
            self.measure()

    def measure(self) -> dict[str, float]:
        """One run of everything, in milliseconds, for the whole batch.

        encode_ms, prefill_ms (which gives the first token) and decode_ms_per_token are those of
        three programs run one after another, total_ms is that of the one program that generation
        runs.
        """
        hidden, encode_ms = _timed(self._encode)
        first, prefill_ms = _timed(self._prefill, hidden)
        _, decode_ms = _timed(self._loop, first)
        _, total_ms = _timed(self._whole)
        return {
            "encode_ms": encode_ms,
            "prefill_ms": prefill_ms,
            "decode_ms_per_token": decode_ms / self._steps,
            "total_ms": total_ms,
        }

    def run(self) -> None:
        """One run of the whole program, for a profiler."""
        jax.block_until_ready(self._whole())


def _compiled(mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    return result, (time.perf_counter() - start) * 1e3
