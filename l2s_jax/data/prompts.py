"""Random prompts for measurements; without JAX, for processes that measure something else."""

from __future__ import annotations

import numpy as np


def random_prompts(batch_size: int, prompt_tokens: int, vocab_size: int) -> np.ndarray:
    """int32 [B, T], the same for every caller.

    Ids are from 3 to nine tenths of the vocabulary: special tokens lie before and after these.
    """
    random = np.random.default_rng(0)
    end = max(vocab_size * 9 // 10, 4)
    return random.integers(3, end, (batch_size, prompt_tokens), dtype=np.int32)
