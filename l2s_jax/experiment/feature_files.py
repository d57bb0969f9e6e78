"""H, the frozen LLM's representations of prompts: computed once, kept on disk, read by training.

A cache is a folder with a subfolder for each LLM that has encoded prompts, named by a hash of all
that H depends on besides the prompt, which lies in it as `features.json`. H itself is bfloat16
[t, D] of the t tokens of a prompt, without padding, one ArrayRecord record each, kept by the hash
of the prompt's ids: every run and split that has the same prompt finds it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from l2s_jax.cluster import distributed, sharding
from l2s_jax.data.batches import LengthGroups
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.experiment import shards
from l2s_jax.experiment.workdir import fingerprint
from l2s_jax.files import (
    UNFINISHED,
    atomic_directory,
    plain,
    read_json,
    replacing,
    write_bytes,
    write_json,
)
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.systems import Params, represent

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 26
# Each stays open once it has been read from.
_MOST_SHARDS = 512
_FACTS = "features.json"
_SUFFIX, _INDEX_SUFFIX = ".array_record", ".index"
# Of what an encoder makes of the same weights and ids: higher where that changes.
VERSION = 1
# zstd would make H, which is close to noise, a fifth smaller, and reading it four times as slow.
_WRITER = "group_size:1,uncompressed"
_AGAIN = "remove it, and the same command makes it again"

Encode = Callable[[np.ndarray, np.ndarray], jax.Array]


class Encoder:
    """The frozen LLM on a mesh: ids int32, mask bool [B, T] -> H bfloat16 [B, T, D].

    All processes of a job call it alike, with whole batches, and all have the whole of H.
    """

    def __init__(self, config: ModelConfig, frozen: Params, mesh: Mesh):
        """The LLM's config, and its parameters that encode."""
        self._mesh = mesh
        self._frozen = sharding.put_parameters(frozen, mesh)
        self._encode = jax.jit(
            lambda frozen, ids, mask: represent(config, frozen, ids, mask).astype(jnp.bfloat16),
            out_shardings=NamedSharding(mesh, P()),
        )

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        batch = sharding.put((ids, mask), sharding.batch_sharding(self._mesh))
        with jax.set_mesh(self._mesh):
            return self._encode(self._frozen, *batch)


class FeatureFiles:
    """Shards features-NUMBER-HASH.array_record, each with an index of keys beside it.

    HASH is that of the keys, so that runs that share a cache do not take each other's names.
    """

    def __init__(self, directory: str):
        self._directory = directory

    def files(self) -> list[str]:
        """Paths of the shards that are there, in order of their numbers."""
        return sorted(glob.glob(os.path.join(glob.escape(self._directory), f"*{_SUFFIX}")))

    def keys(self, files: Sequence[str]) -> set[bytes]:
        """Keys of all prompts in some shards."""
        return {key for path in files for key in self.index(path)}

    def index(self, path: str) -> list[bytes]:
        """The key of each record of a shard.

        Raises:
          ValueError: there is no index.
        """
        name = f"{path.removesuffix(_SUFFIX)}{_INDEX_SUFFIX}"
        try:
            return np.fromfile(name, "V16").tolist()
        except OSError as error:
            raise ValueError(f"{name}: not readable: {error.strerror}; {_AGAIN}") from None

    def write(self, number: int, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> None:
        """Adds a shard: H [t, D] of each key."""
        digest = hashlib.sha256(b"".join(keys)).hexdigest()[:8]
        stem = os.path.join(self._directory, f"features-{number:05d}-{digest}")
        write_bytes(f"{stem}{_INDEX_SUFFIX}", b"".join(keys))
        path = f"{stem}{_SUFFIX}"
        try:
            with replacing(path) as temporary:
                writer = ArrayRecordWriter(temporary, _WRITER)
                for value in values:
                    writer.write(value.tobytes())
                writer.close()
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None


class Features:
    """H of examples, read from complete shards by index: what `TokenizedExamples.hidden` may be."""

    def __init__(
        self, store: FeatureFiles, files: Sequence[str], data: TokenizedExamples, width: int
    ):
        """`data` are the examples, all of whose prompts are in `files`; `width` is D.

        Raises:
          ValueError: a file that is not a whole shard of as many records as there should be, also
            where it is found out later.
        """
        self._files, self._width, self._lengths = list(files), width, data.prompt_lengths
        places: dict[bytes, int] = {}
        starts = [0]
        for path in files:
            keys = store.index(path)
            with _readable(path):
                reader = ArrayRecordReader(path)
                found = reader.num_records()
                reader.close()
            if found != len(keys):
                raise ValueError(f"{path}: {found} records, expected {len(keys)}; {_AGAIN}")
            places.update(zip(keys, range(starts[-1], starts[-1] + found), strict=True))
            starts.append(starts[-1] + found)
        self._starts = np.array(starts)
        self._places = np.array([places[key] for key in data.prompt_keys], np.int64)
        counts = np.diff(self._starts)
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{count}]" for path, count in zip(files, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        """H of one prompt, bfloat16 [t, D]."""
        place = self._places[index]
        path = self._files[np.searchsorted(self._starts, place, "right") - 1]
        with _readable(path):
            record = self._records[place]
        shape = (int(self._lengths[index]), self._width)
        if len(record) != 2 * math.prod(shape):
            raise ValueError(
                f"{path}: {len(record)} bytes for prompt {index}, expected {2 * math.prod(shape)}; "
                f"{_AGAIN}"
            )
        return np.frombuffer(record, ml_dtypes.bfloat16).reshape(shape)

    def padded(self, indices: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """H of prompts `indices` [B], bfloat16 [B, prompt_tokens, D]; zeros elsewhere."""
        shape = (len(indices), prompt_tokens, self._width)
        batch = np.zeros(shape, ml_dtypes.bfloat16)
        for row, index in enumerate(indices):
            if index >= 0:
                hidden = self[index]
                batch[row, : len(hidden)] = hidden
        return batch


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Has errors of ArrayRecord's reader, whatever their class, name the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: not readable: {error}; {_AGAIN}") from None


def check_folder(folder: str) -> None:
    """Raises a ValueError where `folder` can be no cache: it is a URL, or a subfolder of one."""
    if "://" in folder:
        raise ValueError(f"config.features.cache={folder!r}: expected a folder, local or mounted")
    path = os.path.join(folder, _FACTS)
    if os.path.exists(path):
        raise ValueError(
            f"config.features.cache={folder!r}: holds what one LLM (content hash "
            f"{str(read_json(path).get('llm_hash'))[:12]}) made of prompts; expected the folder "
            f"above it, {os.path.dirname(os.path.abspath(folder))!r}, in which every LLM finds its "
            "own"
        )


def folder_of(cache: str, facts: Mapping[str, Any]) -> str:
    """The subfolder of a cache for what H depends on besides the prompts."""
    return os.path.join(cache, fingerprint(facts)[:32])


def cached(
    data: TokenizedExamples,
    cache: str,
    facts: Mapping[str, Any],
    make_encoder: Callable[[], Encode],
    *,
    split: str,
    width: int,
    buckets: Sequence[int],
    batch_size: int,
) -> Features:
    """H of the prompts of `data`, from a cache; what is missing is computed first.

    The processes of a job, which share the cache, encode together and take turns in writing.

    Args:
      data: the prompts.
      cache: the folder.
      facts: what H depends on besides the prompts; JSON-able, with "llm_hash".
      make_encoder: gives, only where something is missing, what encodes batches (see `Encoder`).
      split: whose prompts these are, for messages.
      width: D, the LLM's width.
      buckets: lengths that prompts are padded to for the LLM, ascending.
      batch_size: prompts that it encodes at a time.

    Raises:
      ValueError: the subfolder was made from other things than its name says, a shard in it is
        damaged, or the disk is too small.
    """
    facts = plain({**facts, "width": width, "numbers": "bfloat16", "version": VERSION})
    directory = folder_of(cache, facts)
    store, lengths = FeatureFiles(directory), data.prompt_lengths
    mean_bytes = max(2 * width * int(lengths.sum()) // len(data), 1)
    encoders: list[Encode] = []
    bar = tqdm(desc=f"features of {split}", disable=True)

    def announce(missing: list[int]) -> None:
        nonlocal bar
        tokens = int(lengths[missing].sum())
        distributed.on_primary(lambda: _check_disk(cache, 2 * width * tokens, tokens, split))
        distributed.on_primary(lambda: _prepare(directory, facts))
        log.info(
            "features: the LLM encodes %d of %d prompts into %s",
            len(missing),
            len(set(data.prompt_keys)),
            directory,
        )
        encoders.append(make_encoder())
        bar = tqdm(
            total=len(missing),
            desc=f"features of {split}",
            disable=not distributed.is_primary(),
            file=sys.stderr,
        )

    def make(places: list[int], own: bool) -> list[np.ndarray] | None:
        rows: dict[int, np.ndarray] = {}
        for indices, hidden in _encoded(data, np.array(places), encoders[0], buckets, batch_size):
            bar.update(len(indices))
            if own:
                for index, row in zip(indices, np.asarray(hidden), strict=False):
                    rows[index] = row[: lengths[index]]
        return [rows[place] for place in places] if own else None

    def check() -> None:
        if os.path.isdir(directory):
            _check_facts(directory, facts)

    distributed.on_primary(check)
    size = max(SHARD_BYTES // mean_bytes, -(-len(data) // _MOST_SHARDS), 1)
    files = shards.fill(store, data.prompt_keys, make, size=size, together=True, announce=announce)
    bar.close()
    distributed.on_primary(lambda: _tidy(directory))
    return Features(store, files, data, width)


def _encoded(
    data: TokenizedExamples,
    prompts: np.ndarray,
    encode: Encode,
    buckets: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """(indices, H of them in the first rows) of all `prompts`, in order of their lengths."""

    def dispatched() -> Iterator[tuple[np.ndarray, jax.Array]]:
        for indices, width in LengthGroups(data, prompts, buckets, batch_size):
            yield indices[indices >= 0], encode(*data.padded_prompts(indices, width))

    # The device is at the next batch while the host takes this one.
    for (indices, hidden), _ in itertools.pairwise(itertools.chain(dispatched(), [None])):
        yield indices, jax.block_until_ready(hidden)


def _check_disk(cache: str, needed: int, tokens: int, split: str) -> None:
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
    if os.path.isdir(directory):
        return
    try:
        with atomic_directory(directory) as temporary:
            write_json(os.path.join(temporary, _FACTS), facts, sort_keys=True)
    except OSError:
        if not os.path.isdir(directory):
            raise


def _check_facts(directory: str, facts: Mapping[str, Any]) -> None:
    path = os.path.join(directory, _FACTS)
    found = read_json(path)
    different = [name for name in sorted(found | facts) if found.get(name) != facts.get(name)]
    if different:
        name = "llm_hash" if "llm_hash" in different else different[0]
        whose = "another LLM's" if name == "llm_hash" else "other"
        raise ValueError(
            f"{path}: {whose} features, {name} is {found.get(name)!r}, expected "
            f"{facts.get(name)!r}; remove the folder, and the same command makes it again, or give "
            "config.features.cache another one"
        )


def _tidy(directory: str) -> None:
    """Removes what killed runs left of shards that are all there now."""
    for path in glob.glob(os.path.join(glob.escape(directory), f"*{UNFINISHED}")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
