"""H of prompts on disk, and how it is read by training.

H is bfloat16 [t, D] of the t tokens of a prompt, without padding, one record each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.experiment.record_files import RecordFiles, Records

# Beside the shards: what they are of.
FACTS = "features.json"


class FeatureFiles(RecordFiles):
    """Shards features-NUMBER-HASH.array_record: H by the keys of prompts."""

    def __init__(self, directory: str):
        super().__init__(directory, "features")


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
        self.width, self._lengths = width, data.prompt_lengths
        self._records = Records(store, files, data.prompt_keys, "prompt")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        """H of one prompt, bfloat16 [t, D]."""
        return next(self._read(np.array([index])))

    def _read(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        lengths = self._lengths[indices].astype(np.int64)
        records = self._records.read(indices, 2 * self.width * lengths)
        for length, record in zip(lengths, records, strict=True):
            yield np.frombuffer(record, ml_dtypes.bfloat16).reshape(length, self.width)

    def padded(self, indices: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """H of prompts `indices` [B], bfloat16 [B, prompt_tokens, D]; zeros elsewhere."""
        shape = (len(indices), prompt_tokens, self.width)
        batch, rows = np.zeros(shape, ml_dtypes.bfloat16), np.flatnonzero(indices >= 0)
        for row, hidden in zip(rows, self._read(indices[rows]), strict=True):
            batch[row, : len(hidden)] = hidden
        return batch
