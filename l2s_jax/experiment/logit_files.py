"""The LLM's distributions over the tokens of responses on disk, and how training reads them.

Of each of the s tokens of a response there are k ids, uint16 where that holds the vocabulary, and
k + 1 log-probabilities in float16: of these ids, and of all others together. Rounded to float16, a
probability p is wrong by at most |log p| / 2048 of itself, in bfloat16 by eight times as much.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.experiment.record_files import RecordFiles, Records

_LOG_PROB = "<f2"
# Whose shares are looked at to say what is left out.
_SAMPLE, _AT_ONCE = 50_000, 256


class LogitFiles(RecordFiles):
    """Shards logits-NUMBER-HASH.array_record: distributions by the keys of prompt and response."""

    def __init__(self, directory: str):
        super().__init__(directory, "logits")


def token_bytes(top_k: int, vocabulary: int) -> int:
    """Bytes that a token takes."""
    return top_k * np.dtype(_id_type(vocabulary)).itemsize + 2 * (top_k + 1)


def encoded(ids: np.ndarray, log_probs: np.ndarray, vocabulary: int) -> np.ndarray:
    """What is kept of ids [s, k] and float16 log-probabilities [s, k + 1], uint8 [n]."""
    parts = ids.astype(_id_type(vocabulary)), log_probs.astype(_LOG_PROB)
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])


class Logits:
    """Distributions of examples, by index: what `TokenizedExamples.teacher` may be."""

    def __init__(
        self,
        store: LogitFiles,
        files: Sequence[str],
        data: TokenizedExamples,
        top_k: int,
        vocabulary: int,
    ):
        """`data` are the examples as the LLM reads them, all of which are in `files`.

        Raises:
          ValueError: a file that is not a whole shard of as many records as there should be, also
            where it is found out later.
        """
        self._lengths, self._top_k, self._vocabulary = data.response_lengths, top_k, vocabulary
        self._records = Records(store, files, data.pair_keys, "response")
        self._places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._records)

    def placed(self, places: np.ndarray) -> Logits:
        """The same for an SLM whose id of the LLM's token v is `places[v]`, int32 [V]; -1: none."""
        other = copy.copy(self)
        other._places = places
        return other

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of one example, as of `read`."""
        return next(self.read(np.array([index])))

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids int32 [s, k], and log-probabilities float32 [s, k + 1], whose last is all others'."""
        lengths, k, kind = self._lengths[indices], self._top_k, _id_type(self._vocabulary)
        sizes = lengths.astype(np.int64) * token_bytes(k, self._vocabulary)
        records = self._records.read(indices, sizes)
        for tokens, record in zip(lengths.tolist(), records, strict=True):
            ids = np.frombuffer(record, kind, tokens * k).reshape(tokens, k).astype(np.int32)
            start = ids.size * np.dtype(kind).itemsize
            log_probs = np.frombuffer(record, _LOG_PROB, offset=start).reshape(tokens, k + 1)
            log_probs = log_probs.astype(np.float32)
            # Once rounded, they no longer have a sum of one.
            yield ids, log_probs - np.log(np.exp(log_probs).sum(-1, keepdims=True))

    def padded(self, indices: np.ndarray, response_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """As of `Teacher`: ids int32 and log-probabilities float32 [B, response_tokens, k]."""
        shape = (len(indices), response_tokens, self._top_k)
        ids, log_probs = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        rows = np.flatnonzero(indices >= 0)
        for row, (own, own_log_probs) in zip(rows, self.read(indices[rows]), strict=True):
            ids[row, : len(own)] = own if self._places is None else self._places[own]
            log_probs[row, : len(own)] = own_log_probs[:, :-1]
        return ids, log_probs

    def left_out(self) -> dict[str, float]:
        """The share of probability of all other tokens: its mean over tokens, and percentile 99.

        Of 50,000 examples, if there are more. Zeros where all responses are empty.
        """
        chosen = np.linspace(0, len(self) - 1, min(len(self), _SAMPLE)).astype(int)
        parts = np.array_split(chosen, -(-len(chosen) // _AT_ONCE))
        shares = np.exp(np.concatenate([p[:, -1] for part in parts for _, p in self.read(part)]))
        if not shares.size:
            return {"mean": 0.0, "p99": 0.0}
        return {"mean": float(shares.mean()), "p99": float(np.percentile(shares, 99))}


def _id_type(vocabulary: int) -> str:
    return "<u2" if vocabulary <= 1 << 16 else "<u4"
