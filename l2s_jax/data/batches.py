"""Padded batches of a few fixed shapes: shuffled, resumable, sharded by process.

Training order comes from a plan, a pure function of the lengths and a seed that can be read at any
step, so the state of an iterator is its step number. Grain reads ahead along the plan.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from l2s_jax.data.examples import TokenizedExamples

Buckets = Sequence[tuple[int, int]]

# So many batches are read before they are asked for, or as many as take so many bytes.
_AHEAD, _AHEAD_BYTES = 8, 1 << 30
# Grain asks for a length; no run comes near this many batches.
_ENDLESS = 1 << 48


class _Planned(NamedTuple):
    bucket: int
    indices: np.ndarray


class _Plan(Sequence[_Planned]):
    """What each training step reads, for all epochs.

    An epoch uses every example once, but for `len(data) % batch_size` that its shuffle leaves out.
    """

    def __init__(self, data: TokenizedExamples, buckets: Buckets, batch_size: int, seed: int):
        widths = np.asarray(buckets)
        self._bucket = np.maximum(
            np.searchsorted(widths[:, 0], data.prompt_lengths),
            np.searchsorted(widths[:, 1], data.response_lengths),
        )
        self._buckets = len(buckets)
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = len(data) // batch_size
        # Reading ahead crosses from one epoch to the next.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> _Planned:
        epoch, batch = divmod(step, self.batches_per_epoch)
        bucket, indices = self._epoch(epoch)
        return _Planned(int(bucket[batch]), indices[batch])

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Buckets [batches] and indices [batches, batch_size] of one epoch.

        Choosing what to leave out before anything is grouped gives long examples the same chance
        to be used as short ones, and lets the rows that move up always end in a full batch.
        """
        rng = np.random.default_rng((self._seed, epoch))
        used = self.batches_per_epoch * self._batch_size
        shuffled = rng.permutation(len(self._bucket))[:used]
        bucket_of = self._bucket[shuffled]
        left = np.zeros(0, shuffled.dtype)
        buckets, indices = [], []
        for bucket in range(self._buckets):
            members = np.concatenate([left, shuffled[bucket_of == bucket]])
            full = len(members) // self._batch_size
            left = members[full * self._batch_size :]
            buckets.append(np.full(full, bucket))
            indices.append(members[: full * self._batch_size].reshape(full, self._batch_size))
        order = rng.permutation(self.batches_per_epoch)
        return np.concatenate(buckets)[order], np.concatenate(indices)[order]


def training_batches(
    data: TokenizedExamples,
    *,
    prompt_name: str,
    buckets: Buckets,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches, epoch after epoch, each in its own order.

    A batch is as wide as the smallest bucket that holds its examples. Rows that do not fill a batch
    of their bucket move up to the next one, and fewer than `batch_size` examples sit an epoch out.

    Args:
      data: the examples.
      prompt_name: "llm" or "slm_prompt": whose ids the prompts are.
      buckets: (prompt tokens, response tokens), ascending in both; the last must hold the maxima
        of `data`.
      batch_size: rows of the global batch.
      seed: of the order, at least 0.
      rows: which rows of each global batch this process reads; None: all.

    Returns:
      An iterator with `get_state()` and `set_state(state)` over dicts of `{prompt_name}_ids` int32
      and `{prompt_name}_mask` bool [B, T], `response_ids` int32 and `response_mask` bool [B, S],
      and, where `data` has them, `{prompt_name}_hidden` [B, T, D], `teacher_ids` int32 and
      `teacher_log_probs` float32 [B, S, k].

    Raises:
      ValueError: the buckets do not ascend or are too small, or there are fewer examples than
        `batch_size`.
    """
    _check_buckets(data, buckets)
    if batch_size < 1 or len(data) < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, expected 1 to {len(data)}, the number of examples"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")

    def collate(planned: _Planned) -> dict[str, np.ndarray]:
        indices = planned.indices if rows is None else planned.indices[rows]
        return data.padded(indices, *buckets[planned.bucket], prompt_name)

    plan = _Plan(data, buckets, batch_size, seed)
    ahead = _read_ahead(data, buckets, batch_size if rows is None else len(rows))
    return iter(grain.MapDataset.source(plan).map(collate).to_iter_dataset(ahead))


def examples_of(
    data: TokenizedExamples, step: int, *, buckets: Buckets, batch_size: int, seed: int
) -> np.ndarray:
    """Which examples the batch of a step, counted from 1, of `training_batches` holds, int64 [B].

    They are counted from 0 among those that `data` was made of.
    """
    return data.places[_Plan(data, buckets, batch_size, seed)[step - 1].indices]


class LengthGroups(Sequence[tuple[np.ndarray, int]]):
    """Prompts in groups of like lengths: (indices int64 [size], tokens to pad them to).

    -1 fills up the last group.
    """

    def __init__(
        self, data: TokenizedExamples, prompts: np.ndarray, widths: Sequence[int], size: int
    ):
        """`prompts`: indices into `data`, int64 [N]. `widths` ascend.

        Raises:
          ValueError: a prompt is longer than the largest width.
        """
        self._lengths, self._widths, self._size = data.prompt_lengths, np.asarray(widths), size
        longest = self._lengths[prompts].max(initial=0)
        if longest > widths[-1]:
            raise ValueError(f"a prompt has {longest} tokens: expected at most {widths[-1]}")
        self._order = prompts[np.argsort(self._lengths[prompts], kind="stable")]

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __getitem__(self, group: int) -> tuple[np.ndarray, int]:
        start = range(len(self))[group] * self._size
        chosen = self._order[start : start + self._size]
        indices = np.full(self._size, -1, np.int64)
        indices[: len(chosen)] = chosen
        longest = self._lengths[chosen].max()
        return indices, int(self._widths[np.searchsorted(self._widths, longest)])


class _EvaluationBatches(Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]):
    def __init__(
        self,
        data: TokenizedExamples,
        prompt_name: str,
        buckets: Buckets,
        size: int,
        own_rows: np.ndarray | slice = slice(None),
    ):
        self._data = data
        self._prompt_name = prompt_name
        widths = [prompt for prompt, _ in buckets]
        self._groups = LengthGroups(data, np.arange(len(data)), widths, size)
        self._response_width = buckets[-1][1]
        self._own_rows = own_rows

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, batch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        indices, width = self._groups[batch]
        indices = indices[self._own_rows]
        return indices, self._data.padded(indices, width, self._response_width, self._prompt_name)


def evaluation_batches(
    data: TokenizedExamples, *, prompt_name: str, buckets: Buckets, batch_size: int
) -> Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Every example once, in order of prompt length.

    Nothing but `response_ids` and `response_mask` depends on a response: prompts are grouped and
    padded by their own lengths, and responses are padded to the widest bucket.

    Args:
      data: the examples.
      prompt_name: "llm" or "slm_prompt".
      buckets: as in `training_batches`.
      batch_size: rows of each batch.

    Returns:
      Pairs of indices into `data` (int64 [B], -1 for the padding rows that fill the last batch) and
      a batch as in `training_batches`. A padding row's prompt mask has one true token; its response
      mask has none.

    Raises:
      ValueError: the buckets do not ascend or are too small, or `batch_size` is below 1.
    """
    _check_evaluation(data, buckets, batch_size)
    return _EvaluationBatches(data, prompt_name, buckets, batch_size)


def validation_batches(
    data: TokenizedExamples,
    *,
    prompt_name: str,
    buckets: Buckets,
    batch_size: int,
    rows: np.ndarray,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """The batches of `evaluation_batches` without their indices, to be read again and again.

    rows: which rows of each global batch this process reads.
    """
    _check_evaluation(data, buckets, batch_size)
    batches = _EvaluationBatches(data, prompt_name, buckets, batch_size, rows)
    ahead = _read_ahead(data, buckets, len(rows))
    return grain.MapDataset.source(batches).map(lambda pair: pair[1]).to_iter_dataset(ahead)


def _read_ahead(data: TokenizedExamples, buckets: Buckets, rows: int) -> grain.ReadOptions:
    """How far batches of so many rows are read ahead: H of long prompts is large."""
    batches = _AHEAD
    if data.hidden is not None:
        largest = 2 * rows * buckets[-1][0] * data.hidden.width
        batches = max(min(_AHEAD, _AHEAD_BYTES // largest), 1)
    return grain.ReadOptions(num_threads=1, prefetch_buffer_size=batches)


def _check_evaluation(data: TokenizedExamples, buckets: Buckets, batch_size: int) -> None:
    _check_buckets(data, buckets)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")


def _check_buckets(data: TokenizedExamples, buckets: Buckets) -> None:
    shown = ", ".join(f"({', '.join(map(str, bucket))})" for bucket in buckets) or "none"
    if not buckets or any(len(bucket) != 2 or min(bucket) < 1 for bucket in buckets):
        raise ValueError(
            f"buckets are {shown}, expected pairs of prompt tokens and response tokens"
        )
    for smaller, larger in itertools.pairwise(buckets):
        if smaller[0] > larger[0] or smaller[1] > larger[1] or tuple(smaller) == tuple(larger):
            raise ValueError(f"buckets are {shown}, expected both sizes to ascend")
    needed = (data.max_prompt_tokens, data.max_response_tokens)
    if buckets[-1][0] < needed[0] or buckets[-1][1] < needed[1]:
        raise ValueError(
            f"buckets are {shown}, expected the last to hold max_prompt_tokens {needed[0]} "
            f"and max_response_tokens {needed[1]}"
        )
