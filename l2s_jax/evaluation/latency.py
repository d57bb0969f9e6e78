"""How long one system takes for one batch, part by part, on random prompts of one length."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from l2s_jax.cluster import sharding
from l2s_jax.data.prompts import random_prompts
from l2s_jax.decoding.engine import GREEDY, decode, prefill
from l2s_jax.decoding.loop import decoding_steps
from l2s_jax.models.exact import Exact
from l2s_jax.models.systems import Params, System
from l2s_jax.settings.search import Search


class Stopwatch:
    """The compiled programs of one system at one shape.

    compile_s is the time that the whole program, from prompt to response, took to compile.
    """

    def __init__(
        self,
        system: System | Exact,
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
        # The same program gives one token, or all.
        of_one, of_all = (
            np.where(np.arange(rows) < batch_size, limit, 0).astype(np.int32)
            for limit in (1, new_tokens)
        )
        ids, mask, of_one, of_all, seeds = sharding.put(
            (
                *(prompts, np.ones(prompts.shape, bool), of_one, of_all),
                np.arange(rows, dtype=np.uint32),
            ),
            sharding.batch_sharding(mesh),
        )
        settings = {"max_new_tokens": new_tokens, "search": search}
        whole_chunks = search.num_beams == 1 and not isinstance(system, Exact)
        self._steps = max(decoding_steps(new_tokens) if whole_chunks else new_tokens - 1, 1)

        encode = _compiled(mesh, system.encode, trained, frozen, ids, mask)
        began = time.perf_counter()
        whole = _compiled(
            mesh,
            lambda *arguments: decode(system, *arguments, end_ids=(), **settings),
            *(trained, frozen, ids, mask, of_all, seeds),
        )
        self.compile_s = time.perf_counter() - began
        self._cache = lambda: _cache_bytes(system, trained, frozen, ids, mask, **settings)
        self._encode = lambda: encode(trained, frozen, ids, mask)
        self._first = lambda: whole(trained, frozen, ids, mask, of_one, seeds)
        self._whole = lambda: whole(trained, frozen, ids, mask, of_all, seeds)
        for _ in range(2):
            self.measure()

    @functools.cached_property
    def cache_bytes(self) -> int:
        """Size of the cache that a decoding step reads; not of an Exact system, which has two."""
        return self._cache()

    def measure(self) -> dict[str, float]:
        """One run of everything, in milliseconds, for the whole batch.

        total_ms is that of the program that generation runs. Of its parts: encode_ms is that of a
        program that only encodes; prefill_ms is what the first token takes beyond it, and
        decode_ms_per_token what all tokens take beyond the first, over the steps in between.
        """
        encode_ms, first_ms, total_ms = map(_timed, (self._encode, self._first, self._whole))
        return {
            "encode_ms": encode_ms,
            # Noise may make a part that takes nothing negative.
            "prefill_ms": max(first_ms - encode_ms, 0.0),
            "decode_ms_per_token": max(total_ms - first_ms, 0.0) / self._steps,
            "total_ms": total_ms,
        }

    def run(self) -> None:
        """One run of the whole program, for a profiler."""
        jax.block_until_ready(self._whole())


def block_ms(
    system: System,
    trained: Params,
    vocab_size: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    tokens: int,
    mesh: Mesh | None = None,
    repeats: int = 5,
) -> float:
    """Milliseconds that a system takes to read a block of `tokens` of one response at once.

    Of many blocks in one program, one after the other, so that what calls it does not count.
    """
    mesh = mesh or sharding.one_device()
    rows = sharding.batch_ways(mesh)
    prompts = random_prompts(rows, prompt_tokens, vocab_size)
    arguments = sharding.put((prompts, np.ones(prompts.shape, bool)), sharding.batch_sharding(mesh))

    def read(trained: Params, ids: jax.Array, mask: jax.Array, times: int) -> jax.Array:
        hidden = system.encode(trained, {}, ids, mask)
        logits, cache = system.prefill(trained, {}, ids, mask, hidden, new_tokens + tokens)

        def one(_: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            token, cache = carry
            block = jnp.broadcast_to(token[:, None], (rows, tokens))
            found, after = system.extend(trained, block, cache)
            # Back to where it was: the next block takes the same place.
            cache = after.replace(index=cache.index)
            return jnp.argmax(found[:, -1], axis=-1).astype(jnp.int32), cache

        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.lax.fori_loop(0, times, one, (first, cache))[0]

    many = 8
    program = _compiled(mesh, read, trained, *arguments, 1)
    samples = []
    for _ in range(repeats + 1):
        few, all_ = (_timed(lambda n=n: program(trained, *arguments, n)) for n in (1, 1 + many))
        samples.append((all_ - few) / many)
    return float(np.median(samples[1:]))


def _compiled(mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def _cache_bytes(
    system: Any,
    trained: Params,
    frozen: Params,
    ids: jax.Array,
    mask: jax.Array,
    **settings: Any,
) -> int:
    def cache(trained: Params, frozen: Params, ids: jax.Array, mask: jax.Array) -> Any:
        hidden = system.encode(trained, frozen, ids, mask)
        return prefill(system, trained, frozen, ids, mask, hidden, **settings)[1]

    leaves = jax.tree.leaves(jax.eval_shape(cache, trained, frozen, ids, mask))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return (time.perf_counter() - start) * 1e3
