"""The stage of the SLM's vocabulary: which pieces of its tokenizer responses are written with."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import numpy as np

from l2s_jax.data.table import chunks
from l2s_jax.data.tokens import AT_ONCE
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.files import is_file
from l2s_jax.tokenizers import Tokenizer
from l2s_jax.tokenizers.cut import (
    VOCABULARY_FILE,
    CutTokenizer,
    choose,
    count,
    essential,
    read_kept,
)

log = logging.getLogger(__name__)


class VocabularyStage(RecordedStage):
    """The pieces that the train split's responses use, or the most used of them, or all."""

    def __init__(self, context: Context, tokenizer: TokenizerStage, labels: LabelStage):
        super().__init__(context, "vocabulary", tokenizer.source, labels)
        self._tokenizer, self._labels = tokenizer, labels
        setting = context.config.slm.vocabulary
        self._is_used = setting != "all"
        self._size = int(setting) if setting.isdecimal() else 0

    def is_used(self) -> bool:
        """Whether some pieces are left out."""
        return self._is_used

    def inputs(self) -> dict[str, Any]:
        """The responses, the pieces, how many are kept."""
        return {
            **self._labels.learnt_inputs(),
            "data": self._labels.content(),
            "tokenizer": self._tokenizer.tokenizer.identity,
            "size": self._size,
        }

    def is_made(self) -> bool:
        """Whether the list is there."""
        return is_file(os.path.join(self.record.directory, VOCABULARY_FILE))

    def progress(self) -> str:
        """It is made in one go."""
        return ""

    def check(self) -> None:
        """Finds out before others train what the tokenizer says of the size.

        Raises:
          ValueError: it is too small for what is always kept, or larger than the tokenizer's.
        """
        if not self._size:
            return
        whole = self._tokenizer.tokenizer
        least = len(essential(whole))
        if not least <= self._size <= whole.vocab_size:
            raise ValueError(
                f"config.slm.vocabulary={self._size}: expected {least}, the tokenizer's special "
                f"pieces, single characters and bytes, to {whole.vocab_size}, all that it has"
            )

    def make(self) -> None:
        """Counts pieces, in one process for all."""
        from l2s_jax.cluster import distributed

        examples = self._labels.examples()

        def make() -> None:
            whole = self._tokenizer.tokenizer
            uses = np.zeros(whole.vocab_size, np.int64)
            for some in chunks(examples, AT_ONCE):
                responses = whole.encode_responses([example.response for example in some])
                uses += count(whole, responses)
            kept = choose(whole, uses, self._size)
            log.info(
                "vocabulary: responses are written with %d of %d pieces, which are %.2f%% of those "
                "in use",
                len(kept),
                whole.vocab_size,
                100 * uses[kept].sum() / uses.sum(),
            )
            with self.record.filling(VOCABULARY_FILE) as folder:
                CutTokenizer(whole, kept).save(folder)

        distributed.on_primary(make)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The SLM's tokenizer: prompts have all of its pieces."""
        whole = self._tokenizer.tokenizer
        kept = read_kept(self.made()) if self.is_used() else None
        return whole if kept is None else CutTokenizer(whole, kept, origin=self.record.directory)
