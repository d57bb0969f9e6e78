"""H, the frozen LLM's representations of prompts: computed once, kept on disk, read by training.

A cache is a folder with a subfolder for each set of prompts that an LLM has encoded, named by a
hash of all that H depends on, which lies in it as `features.json`. H itself is bfloat16 [t, D] of
the t tokens of a prompt, without padding, one ArrayRecord record each. The records are in shards,
each of which appears whole or not at all, so that an interrupted run continues with the first that
is missing.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from l2s_jax.experiment.workdir import fingerprint
from l2s_jax.files import UNFINISHED, atomic_directory, plain, read_json, replacing, write_json
from l2s_jax.models.systems import LlmToSlm, Params

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 26
# Each stays open once it has been read from.
_MOST_SHARDS = 512
_FACTS = "features.json"
# zstd would make H, which is close to noise, a fifth smaller, and reading it four times as slow.
_WRITER = "group_size:1,uncompressed"
_AGAIN = "remove it, and the same command makes it again"

Encode = Callable[[np.ndarray, np.ndarray], jax.Array]


class Encoder:
    """The frozen LLM on a mesh: ids int32, mask bool [B, T] -> H bfloat16 [B, T, D].

    All processes of a job call it alike, with whole batches, and all have the whole of H.
    """

    def __init__(self, system: LlmToSlm, frozen: Params, mesh: Mesh):
        self._mesh = mesh
        self._frozen = sharding.put_parameters(frozen, mesh)
        self._encode = jax.jit(
            lambda frozen, ids, mask: system.encode({}, frozen, ids, mask).astype(jnp.bfloat16),
            out_shardings=NamedSharding(mesh, P()),
        )

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        batch = sharding.put((ids, mask), sharding.batch_sharding(self._mesh))
        with jax.set_mesh(self._mesh):
            return self._encode(self._frozen, *batch)


class Shards(NamedTuple):
    """Which prompts are in which file.

    size: prompts in each shard but the last; lengths: tokens of each prompt, int32; width: D.
    """

    directory: str
    size: int
    lengths: np.ndarray
    width: int

    @property
    def paths(self) -> list[str]:
        """The files, in order."""
        count = -(-len(self.lengths) // self.size)
        return [
            os.path.join(self.directory, f"features-{n:05d}-of-{count:05d}.array_record")
            for n in range(count)
        ]

    def prompts(self, number: int) -> np.ndarray:
        """Indices of the prompts in a shard."""
        return np.arange(number * self.size, min((number + 1) * self.size, len(self.lengths)))

    def bytes(self, numbers: Sequence[int]) -> int:
        """Size of H in some shards."""
        tokens = sum(int(self.lengths[self.prompts(number)].sum()) for number in numbers)
        return 2 * self.width * tokens


class Features:
    """H of examples, read from complete shards by index: what `TokenizedExamples.hidden` may be.

    Raises:
      ValueError: a file that is not a whole shard of as many records as there should be, also
        where it is found out later.
    """

    def __init__(self, shards: Shards):
        self.shards = shards
        self._paths = shards.paths
        counts = [len(shards.prompts(number)) for number in range(len(self._paths))]
        for path, count in zip(self._paths, counts, strict=True):
            with _readable(path):
                reader = ArrayRecordReader(path)
                found = reader.num_records()
                reader.close()
            if found != count:
                raise ValueError(f"{path}: {found} records, expected {count}; {_AGAIN}")
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{count}]" for path, count in zip(self._paths, counts, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.shards.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """H of one prompt, bfloat16 [t, D]."""
        index = range(len(self))[index]
        path = self._paths[index // self.shards.size]
        with _readable(path):
            record = self._records[index]
        shape = (int(self.shards.lengths[index]), self.shards.width)
        if len(record) != 2 * math.prod(shape):
            raise ValueError(
                f"{path}: {len(record)} bytes for prompt {index}, expected {2 * math.prod(shape)}; "
                f"{_AGAIN}"
            )
        return np.frombuffer(record, ml_dtypes.bfloat16).reshape(shape)

    def padded(self, indices: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """H of prompts `indices` [B], bfloat16 [B, prompt_tokens, D]; zeros elsewhere."""
        shape = (len(indices), prompt_tokens, self.shards.width)
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
        facts = read_json(path)
        raise ValueError(
            f"config.features.cache={folder!r}: holds what one LLM (content hash "
            f"{str(facts.get('llm_hash'))[:12]}) made of the {facts.get('split')} split of "
            f"{facts.get('task')!r} only; expected the folder above it, "
            f"{os.path.dirname(os.path.abspath(folder))!r}, in which every LLM finds its own"
        )


def cached(
    data: TokenizedExamples,
    folder: str,
    facts: Mapping[str, Any],
    make_encoder: Callable[[], Encode],
    *,
    width: int,
    buckets: Sequence[int],
    batch_size: int,
) -> Features:
    """H of the prompts of `data`, from the cache in `folder`; what is missing is computed first.

    The processes of a job, which share `folder`, encode together and take turns in writing.

    Args:
      data: the prompts.
      folder: the cache.
      facts: what H depends on besides the prompts; JSON-able, with "llm_hash", "task" and "split".
      make_encoder: gives, only where something is missing, what encodes batches (see `Encoder`).
      width: D, the LLM's width.
      buckets: lengths that prompts are padded to for the LLM, ascending.
      batch_size: prompts that it encodes at a time.

    Raises:
      ValueError: the subfolder was made from other things than its name says, a shard in it is
        damaged, or the disk is too small.
    """
    tokens = int(data.prompt_lengths.sum())
    size = max(SHARD_BYTES * len(data) // (2 * width * tokens), -(-len(data) // _MOST_SHARDS), 1)
    facts = plain(
        {
            **facts,
            "prompts": data.prompts_hash,
            "examples": len(data),
            "tokens": tokens,
            "width": width,
            "numbers": "bfloat16",
            "examples_per_shard": size,
        }
    )
    directory = os.path.join(folder, fingerprint(facts)[:32])
    shards = Shards(directory, size, data.prompt_lengths, width)
    if missing := distributed.on_primary(lambda: _prepare(shards, facts)):
        prompts = sum(len(shards.prompts(number)) for number in missing)
        log.info(
            "features: the LLM encodes %d of %d prompts into %s", prompts, len(data), directory
        )
        encode = make_encoder()
        with tqdm(
            total=prompts,
            desc=f"features of {facts['split']}",
            disable=not distributed.is_primary(),
            file=sys.stderr,
        ) as bar:
            for number in missing:
                encoded = _encoded(data, shards.prompts(number), encode, buckets, batch_size)
                own = number % jax.process_count() == jax.process_index()
                records: dict[int, bytes] = {}
                for indices, hidden in encoded:
                    bar.update(len(indices))
                    if own:
                        for index, row in zip(indices, np.asarray(hidden), strict=False):
                            records[index] = row[: data.prompt_lengths[index]].tobytes()
                if own:
                    _write(shards.paths[number], [records[i] for i in shards.prompts(number)])
        distributed.barrier("features")
        distributed.on_primary(lambda: _tidy(directory))
    return Features(shards)


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


def _prepare(shards: Shards, facts: Mapping[str, Any]) -> list[int]:
    """Numbers of the shards that are missing; their folder is made, or was made from `facts`."""
    directory, paths = shards.directory, shards.paths
    found = os.path.isdir(directory)
    if found:
        _check_facts(directory, facts)
    missing = [number for number, path in enumerate(paths) if not os.path.exists(path)]
    if not missing:
        return missing
    folder = os.path.dirname(directory)
    os.makedirs(folder, exist_ok=True)
    needed, free = shards.bytes(missing), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"config.features.cache={folder!r}: {free / 1e9:.1f} GB are free there, the features "
            f"of {facts['tokens']:,} prompt tokens of the {facts['split']} split take "
            f"{needed / 1e9:.1f} GB more; expected a larger disk, or config.features.cache='' to "
            "do without"
        )
    if not found:
        # Another run that shares the cache sees the folder with the file in it, or not at all.
        try:
            with atomic_directory(directory) as temporary:
                write_json(os.path.join(temporary, _FACTS), facts, sort_keys=True)
        except OSError:
            if not os.path.isdir(directory):
                raise
            _check_facts(directory, facts)
    return missing


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


def _write(path: str, records: Sequence[bytes]) -> None:
    """A shard, which is never seen half-written."""
    try:
        with replacing(path) as temporary:
            writer = ArrayRecordWriter(temporary, _WRITER)
            for record in records:
                writer.write(record)
            writer.close()
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None


def _tidy(directory: str) -> None:
    """Removes what killed runs left of shards that are all there now."""
    for path in glob.glob(os.path.join(glob.escape(directory), f"*{UNFINISHED}")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
