"""Examples to padded batches of a few fixed shapes: shuffled, resumable, sharded by process.

Training order comes from a plan, a pure function of the lengths and a seed that can be read at any
step, so the state of an iterator is its step number. Grain reads ahead along the plan.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np

from l2s_jax.data.tasks import Example
from l2s_jax.text import Tokenizer

Buckets = Sequence[tuple[int, int]]

_TOKENIZE_AT_ONCE = 8192
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
# Grain asks for a length; no run comes near this many batches.
_ENDLESS = 1 << 48


class _Ragged(NamedTuple):
    """Sequences of different lengths, end to end: i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets).astype(np.int32)

    @classmethod
    def concatenate(cls, chunks: Iterable[Sequence[Sequence[int]]]) -> "_Ragged":
        values, lengths = [], []
        for chunk in chunks:
            lengths.append(np.fromiter(map(len, chunk), np.int64, len(chunk)))
            values.append(np.fromiter(itertools.chain.from_iterable(chunk), np.int32))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths or [[]]), dtype=np.int64)])
        return cls(np.concatenate(values or [np.zeros(0, np.int32)]), offsets)


class Hidden(Protocol):
    """Where an LLM's representations H of the prompts are read from."""

    def padded(self, indices: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """H of prompts `indices` [B], none where -1: [B, prompt_tokens, D], zeros elsewhere."""
        ...


class _Tokens(NamedTuple):
    prompts: _Ragged
    responses: _Ragged
    truncated_prompts: int
    truncated_responses: int


class TokenizedExamples:
    """Token ids of examples, computed on first use, all at once, and kept as two flat arrays.

    A sequence over its maximum is cut; where the tokenizer ended it with eos, so does the cut one.
    Once `hidden` is set, batches hold what it reads too.

    Args:
      examples: what to tokenize; references are not used.
      prompt_tokenizer: tokenizer of the prompts.
      response_tokenizer: tokenizer of the responses.
      max_prompt_tokens: longest prompt kept, eos included.
      max_response_tokens: longest response kept, eos included.

    Raises:
      ValueError: a maximum is below 1.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        prompt_tokenizer: Tokenizer,
        response_tokenizer: Tokenizer,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ):
        for name, value in (
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_response_tokens", max_response_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._examples = examples
        self.prompt_tokenizer = prompt_tokenizer
        self.response_tokenizer = response_tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.prompt_pad_id = prompt_tokenizer.pad_id
        self.response_pad_id = response_tokenizer.pad_id
        self.hidden: Hidden | None = None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of prompt and response `index`, int32 [t] and [s]."""
        index = range(len(self))[index]
        return self._tokens.prompts[index], self._tokens.responses[index]

    @property
    def truncated_prompts(self) -> int:
        """How many prompts were cut."""
        return self._tokens.truncated_prompts

    @property
    def truncated_responses(self) -> int:
        """How many responses were cut."""
        return self._tokens.truncated_responses

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt after the cut, int32 [len(self)]."""
        return self._tokens.prompts.lengths

    @functools.cached_property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each response after the cut, int32 [len(self)]."""
        return self._tokens.responses.lengths

    @functools.cached_property
    def prompts_hash(self) -> str:
        """sha256 (hex) over the ids of all prompts, as they are after the cut."""
        values, offsets = self._tokens.prompts
        digest = hashlib.sha256(offsets.astype("<i8"))
        digest.update(values.astype("<i4"))
        return digest.hexdigest()

    def padded_prompts(
        self, indices: np.ndarray, prompt_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask bool [B, prompt_tokens] of the prompts of `padded`."""
        ids, mask = _pad(self._tokens.prompts, indices, prompt_tokens, self.prompt_pad_id)
        mask[indices < 0, 0] = True
        return ids, mask

    def padded(
        self, indices: np.ndarray, prompt_tokens: int, response_tokens: int, prompt_name: str
    ) -> dict[str, np.ndarray]:
        """The batch of examples `indices` [B], padded to [B, prompt_tokens], [B, response_tokens].

        An index of -1 makes a padding row: its prompt mask has one true token, lest a softmax
        over the prompt be empty, and its response mask none, lest it count in a loss.
        """
        prompt_ids, prompt_mask = self.padded_prompts(indices, prompt_tokens)
        response_ids, response_mask = _pad(
            self._tokens.responses, indices, response_tokens, self.response_pad_id
        )
        batch = {
            f"{prompt_name}_ids": prompt_ids,
            f"{prompt_name}_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }
        if self.hidden is not None:
            batch[f"{prompt_name}_hidden"] = self.hidden.padded(indices, prompt_tokens)
        return batch

    @functools.cached_property
    def _tokens(self) -> _Tokens:
        truncated = [0, 0]

        def cut(side: int, encoded: list[list[int]], limit: int, eos_id: int) -> list[list[int]]:
            truncated[side] += sum(len(ids) > limit for ids in encoded)
            return [_cut(ids, limit, eos_id) for ids in encoded]

        prompts, responses = [], []
        for chunk in _chunks(self._examples, _TOKENIZE_AT_ONCE):
            tokenizer = self.prompt_tokenizer
            ids = tokenizer.encode_prompts([example.prompt for example in chunk])
            prompts.append(cut(0, ids, self.max_prompt_tokens, tokenizer.eos_id))
            tokenizer = self.response_tokenizer
            ids = tokenizer.encode_responses([example.response for example in chunk])
            responses.append(cut(1, ids, self.max_response_tokens, tokenizer.eos_id))
        return _Tokens(_Ragged.concatenate(prompts), _Ragged.concatenate(responses), *truncated)


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    remaining = iter(examples)
    while chunk := list(itertools.islice(remaining, size)):
        yield chunk


def _cut(ids: list[int], limit: int, eos_id: int) -> list[int]:
    if len(ids) <= limit:
        return ids
    return [*ids[: limit - 1], eos_id] if ids[-1] == eos_id else ids[:limit]


def _pad(
    sequences: _Ragged, indices: np.ndarray, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(indices), width), pad_id, np.int32)
    mask = np.zeros((len(indices), width), bool)
    for row, index in enumerate(indices):
        if index >= 0:
            sequence = sequences[index]
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = True
    return ids, mask


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
      and, where `data` has it, `{prompt_name}_hidden` [B, T, D].

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
    return iter(grain.MapDataset.source(plan).map(collate).to_iter_dataset(_READ_AHEAD))


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
    return grain.MapDataset.source(batches).map(lambda pair: pair[1]).to_iter_dataset(_READ_AHEAD)


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
