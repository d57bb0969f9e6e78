"""The LLM reads responses: its distributions over their tokens, computed once and kept."""

from __future__ import annotations

import functools
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float16, Int32
from tqdm import tqdm

from l2s_jax.cluster import distributed, placement, rows, sharding
from l2s_jax.cluster.ahead import one_ahead
from l2s_jax.data.batches import Buckets
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.experiment import shards
from l2s_jax.experiment.logit_files import LogitFiles, Logits, encoded, token_bytes
from l2s_jax.experiment.record_files import distinct
from l2s_jax.files import is_bucket
from l2s_jax.models.systems import Batch, LanguageModel, Params
from l2s_jax.training import chunks
from l2s_jax.training.distillation import log_sum_of_others

log = logging.getLogger(__name__)

# Few enough that not much is lost when a run is killed.
SHARD_BYTES = 1 << 22
# Each stays open once it has been read from.
_MOST_SHARDS = 512

Result = tuple[jax.Array, jax.Array]
Score = Callable[[Mapping[str, jax.Array]], Result]


class Scorer:
    """The LLM on a mesh: a batch of whole responses -> (ids, log-probabilities), see `likeliest`.

    Where several processes have one mesh, all call it alike. Each row of the result lies where that
    of the batch does.
    """

    def __init__(
        self, system: LanguageModel, params: Params, mesh: Mesh, *, top_k: int, temperature: float
    ):
        self._mesh, self._params = mesh, params
        self._score = scoring(system, top_k, temperature, sharding.batch_sharding(mesh))

    def __call__(self, batch: Mapping[str, jax.Array]) -> Result:
        with jax.set_mesh(self._mesh):
            return self._score(self._params, dict(batch))


def scoring(system: LanguageModel, top_k: int, temperature: float, result: NamedSharding) -> Any:
    """The program of a `Scorer`, (params, batch) -> its result, which lies as `result` says."""
    return jax.jit(
        lambda params, batch: likeliest(system, params, batch, top_k, temperature),
        out_shardings=result,
    )


def likeliest(
    system: LanguageModel, params: Params, batch: Batch, top_k: int, temperature: float
) -> tuple[Int32[Array, "B S k"], Float16[Array, "B S k+1"]]:
    """The k likeliest tokens in the place of each of a response, and log-probabilities.

    The last log-probability is that of all other tokens; minus infinity where there is none.
    """

    def read(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits / temperature
        kept, ids = placement.top_k(logits, top_k)
        rest = log_sum_of_others(logits, ids)
        total = jax.nn.logsumexp(logits, axis=-1)
        log_probs = jnp.concatenate([kept, rest[..., None]], axis=-1) - total[..., None]
        return ids, log_probs.astype(jnp.float16)

    return chunks.each(read, system.scored(params, {}, batch))


def scored(
    data: TokenizedExamples,
    directory: str,
    make_scorer: Callable[[], Score],
    *,
    top_k: int,
    vocabulary: int,
    buckets: Buckets,
    batch_size: int,
    mesh: Mesh,
) -> Logits:
    """The LLM's distributions of `data`, from a folder; what is missing is computed first.

    Args:
      data: prompts and responses as the LLM reads them.
      directory: where shards are, and will be.
      make_scorer: gives, only where something is missing, what reads batches (see `Scorer`).
      top_k: how many tokens are kept.
      vocabulary: of the LLM.
      buckets: lengths (prompt, response) that batches are padded to, ascending.
      batch_size: examples that it reads at a time.
      mesh: that of the scorer, which splits batches. The processes of a job read every batch
        together, and write rows that they have, where it is of all; else each reads its own.

    Raises:
      ValueError: a shard is damaged, or the disk is too small.
    """
    store, lengths = LogitFiles(directory), data.response_lengths
    size = token_bytes(top_k, vocabulary)
    bar = tqdm(desc="logits", disable=True)

    def announce(missing: np.ndarray) -> None:
        nonlocal bar
        tokens = int(lengths[missing].sum())
        distributed.on_primary(lambda: _check_disk(directory, size * tokens, tokens))
        log.info("logits: the LLM reads %d of %d responses", len(missing), distinct(data.pair_keys))
        silent = not distributed.is_primary()
        own = len(missing) // (1 if mesh.is_multi_process else jax.process_count())
        bar = tqdm(total=own, desc="logits", disable=silent, file=sys.stderr)

    def values(own: np.ndarray, result: Result) -> list[np.ndarray]:
        return [
            encoded(ids[: lengths[index]], log_probs[: lengths[index]], vocabulary)
            for index, ids, log_probs in zip(own, *map(rows.taken, result), strict=True)
            if index >= 0
        ]

    def make(places: list[int], part: shards.Part) -> Iterator[shards.Made]:
        part = (0, 1) if mesh.is_multi_process else part
        batches = _batches(data, np.array(places), make_scorer(), buckets, batch_size, part, mesh)
        for indices, result in batches:
            bar.update(int((indices >= 0).sum()))
            own = rows.own(indices, result[0])
            yield own[own >= 0].tolist(), functools.partial(values, own, result)

    mean_bytes = max(size * int(lengths.sum()) // max(len(data), 1), 1)
    in_shard = max(SHARD_BYTES // mean_bytes, -(-len(data) // _MOST_SHARDS), 1)
    files = shards.fill(
        store, data.pair_keys, make, size=in_shard, together=False, announce=announce
    )
    bar.close()
    distributed.on_primary(store.tidy)
    return Logits(store, files, data, top_k, vocabulary)


def _batches(
    data: TokenizedExamples,
    places: np.ndarray,
    score: Score,
    buckets: Buckets,
    batch_size: int,
    part: shards.Part,
    mesh: Mesh,
) -> Iterator[tuple[np.ndarray, Result]]:
    """(indices, -1 for none, and what comes of them) of a part of `places`, by their buckets.

    Rows that do not fill a batch of their bucket move up to the next one.
    """
    widths = np.asarray(buckets)
    bucket = np.maximum(
        np.searchsorted(widths[:, 0], data.prompt_lengths[places]),
        np.searchsorted(widths[:, 1], data.response_lengths[places]),
    )
    order = np.argsort(bucket, kind="stable")

    def dispatched() -> Iterator[tuple[np.ndarray, Result]]:
        first, each = (batch_size * number for number in part)
        for start in range(first, len(places), each):
            chosen = order[start : start + batch_size]
            indices = np.full(batch_size, -1, np.int64)
            indices[: len(chosen)] = places[chosen]
            brought = indices[sharding.batch_rows(mesh, batch_size)]
            prompt, response = buckets[bucket[chosen].max()]
            batch = data.padded(brought, prompt, response, "llm")
            yield indices, score(sharding.put_batch(batch, mesh, batch_size))

    for indices, result in one_ahead(dispatched()):
        yield indices, jax.block_until_ready(result)


def _check_disk(directory: str, needed: int, tokens: int) -> None:
    if is_bucket(directory):
        return
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(
            f"{directory}: {free / 1e9:.1f} GB are free there, the LLM's distributions over "
            f"{tokens:,} tokens take {needed / 1e9:.1f} GB more; expected a larger disk, or a "
            "smaller config.distillation.top_k"
        )
