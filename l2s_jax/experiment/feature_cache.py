"""H, the frozen LLM's representations of prompts: computed once, kept in a cache.

A cache is a folder with a subfolder for each LLM that has encoded prompts, named by a hash of all
that H depends on besides the prompt, which lies in it as `features.json`. In it H is kept by the
hash of a prompt's ids: every run and split that has the same prompt finds it.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from l2s_jax.cluster import distributed, rows, sharding
from l2s_jax.cluster.ahead import one_ahead
from l2s_jax.data.batches import LengthGroups
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.experiment import shards
from l2s_jax.experiment.feature_files import FACTS, FeatureFiles, Features
from l2s_jax.experiment.record_files import distinct
from l2s_jax.experiment.workdir import fingerprint
from l2s_jax.files import (
    UNFINISHED,
    absolute,
    atomic_directory,
    is_bucket,
    is_file,
    is_whole,
    plain,
    read_json,
    write_json,
)
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.representation import represent
from l2s_jax.models.systems import Params

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 26
# Each stays open once it has been read from.
_MOST_SHARDS = 512

Encode = Callable[..., jax.Array]


class Encoder:
    """The frozen LLM on a mesh: ids int32, mask bool [B, T] -> H bfloat16 [B, T, D].

    All processes of a job call it alike. Each row of H lies where that of the batch does.
    """

    def __init__(
        self, config: ModelConfig, frozen: Params, mesh: Mesh, layers: tuple[int, ...] = ()
    ):
        """The LLM's config, its parameters that encode, and the layers that H is of."""
        self._mesh = mesh
        self._frozen = sharding.put_parameters(frozen, mesh)
        self._encode = encoding(config, layers, sharding.batch_sharding(mesh))

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        with jax.set_mesh(self._mesh):
            return self._encode(self._frozen, ids, mask)


def encoding(config: ModelConfig, layers: tuple[int, ...], result: NamedSharding) -> Any:
    """The program of an `Encoder`, (frozen, ids, mask) -> H, which lies as `result` says."""
    return jax.jit(
        lambda frozen, ids, mask: represent(config, frozen, ids, mask, layers).astype(jnp.bfloat16),
        out_shardings=result,
    )


def check_folder(folder: str) -> None:
    """Raises a ValueError where `folder` can be no cache: another URL, or a subfolder of one."""
    if "://" in folder and not is_bucket(folder):
        raise ValueError(f"config.features.cache={folder!r}: expected a folder, gs:// or s3://")
    path = os.path.join(folder, FACTS)
    if is_file(path):
        raise ValueError(
            f"config.features.cache={folder!r}: holds what one LLM (content hash "
            f"{str(read_json(path).get('llm_hash'))[:12]}) made of prompts; expected the folder "
            f"above it, {os.path.dirname(absolute(folder))!r}, in which every LLM finds its "
            "own"
        )


def cached(
    data: TokenizedExamples,
    cache: str,
    facts: Mapping[str, Any],
    make_encoder: Callable[[], Encode],
    *,
    mesh: Mesh,
    split: str,
    width: int,
    buckets: Sequence[int],
    batch_size: int,
) -> Features:
    """H of the prompts of `data`, from a cache; what is missing is computed first.

    The processes of a job, which share the cache, encode together. Each writes rows that it has.

    Args:
      data: the prompts.
      cache: the folder.
      facts: what H depends on besides the prompts; JSON-able, with "llm_hash".
      make_encoder: gives, only where something is missing, what encodes batches (see `Encoder`).
      mesh: that of the encoder, which splits batches; of all processes.
      split: whose prompts these are, for messages.
      width: D, numbers of H for each token: the LLM's width, times the layers that are joined.
      buckets: lengths that prompts are padded to for the LLM, ascending.
      batch_size: prompts that it encodes at a time.

    Raises:
      ValueError: the subfolder was made from other things than its name says, a shard in it is
        damaged, or the disk is too small.
    """
    facts = plain({**facts, "width": width, "numbers": "bfloat16"})
    directory = os.path.join(cache, fingerprint(facts)[:32])
    store, lengths = FeatureFiles(directory), data.prompt_lengths
    mean_bytes = max(2 * width * int(lengths.sum()) // len(data), 1)
    bar = tqdm(desc=f"features of {split}", disable=True)

    def announce(missing: np.ndarray) -> None:
        nonlocal bar
        tokens = int(lengths[missing].sum())
        distributed.on_primary(lambda: _check_disk(cache, 2 * width * tokens, tokens, split))
        distributed.on_primary(lambda: _prepare(directory, facts))
        log.info(
            "features: the LLM encodes %d of %d prompts into %s",
            len(missing),
            distinct(data.prompt_keys),
            directory,
        )
        bar = tqdm(
            total=len(missing),
            desc=f"features of {split}",
            disable=not distributed.is_primary(),
            file=sys.stderr,
        )

    def values(own: np.ndarray, hidden: jax.Array) -> list[np.ndarray]:
        pairs = zip(own, rows.taken(hidden), strict=True)
        return [row[: lengths[index]] for index, row in pairs if index >= 0]

    def make(places: list[int], _: shards.Part) -> Iterator[shards.Made]:
        groups = LengthGroups(data, np.array(places), buckets, batch_size)
        for indices, hidden in _encoded(data, groups, make_encoder(), mesh):
            bar.update(int((indices >= 0).sum()))
            own = rows.own(indices, hidden)
            yield own[own >= 0].tolist(), functools.partial(values, own, hidden)

    def check() -> None:
        if is_whole(directory, FACTS):
            _check_facts(directory, facts)

    distributed.on_primary(check)
    size = max(SHARD_BYTES // mean_bytes, -(-len(data) // _MOST_SHARDS), 1)
    files = shards.fill(store, data.prompt_keys, make, size=size, together=False, announce=announce)
    bar.close()
    distributed.on_primary(store.tidy)
    distributed.on_primary(lambda: _tidy(directory))
    return Features(store, files, data, width)


def _encoded(
    data: TokenizedExamples, groups: LengthGroups, encode: Encode, mesh: Mesh
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """(indices, H) of each of the groups."""

    def dispatched() -> Iterator[tuple[np.ndarray, jax.Array]]:
        for indices, width in groups:
            brought = indices[sharding.batch_rows(mesh, len(indices))]
            ids, mask = data.padded_prompts(brought, width)
            batch = sharding.put_batch({"ids": ids, "mask": mask}, mesh, len(indices))
            yield indices, encode(**batch)

    for indices, hidden in one_ahead(dispatched()):
        yield indices, jax.block_until_ready(hidden)


def _check_disk(cache: str, needed: int, tokens: int, split: str) -> None:
    if is_bucket(cache):
        return
    os.makedirs(cache, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise ValueError(
            f"config.features.cache={cache!r}: {free / 1e9:.1f} GB are free there, the features "
            f"of {tokens:,} prompt tokens of the {split} split take {needed / 1e9:.1f} GB more; "
            "expected a larger disk, or config.features.cache='' to do without"
        )


def _prepare(directory: str, facts: Mapping[str, Any]) -> None:
    """Makes the folder of shards, or finds the one that another run has made meanwhile."""
    if is_whole(directory, FACTS):
        return
    try:
        with atomic_directory(directory, FACTS) as temporary:
            write_json(os.path.join(temporary, FACTS), facts, sort_keys=True)
    except OSError:
        if not is_whole(directory, FACTS):
            raise


def _tidy(directory: str) -> None:
    """Removes what killed runs left of `directory`, which is there now; who makes it finds it."""
    for path in glob.glob(f"{glob.escape(directory)}.*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _check_facts(directory: str, facts: Mapping[str, Any]) -> None:
    path = os.path.join(directory, FACTS)
    found = read_json(path)
    different = [name for name in sorted({**found, **facts}) if found.get(name) != facts.get(name)]
    if different:
        name = "llm_hash" if "llm_hash" in different else different[0]
        whose = "another LLM's" if name == "llm_hash" else "other"
        raise ValueError(
            f"{path}: {whose} features, {name} is {found.get(name)!r}, expected "
            f"{facts.get(name)!r}; remove the folder, and the same command makes it again, or give "
            "config.features.cache another one"
        )
