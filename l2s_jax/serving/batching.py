"""Prompts in batches of a few fixed shapes, for the programs of a `Generator`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from l2s_jax.data.batches import evaluation_batches
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.models.exact import Exact
from l2s_jax.models.families import check_positions
from l2s_jax.models.systems import LlmToSlm, System
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Arguments of `decode`: int32 and bool [B, T], int32 [B], uint32 [B]."""

    ids: np.ndarray
    mask: np.ndarray
    limits: np.ndarray
    seeds: np.ndarray


class Progress(NamedTuple):
    """tokens int32 [S, B], lengths int32 [B], done bool [B]; drafts: of exact decoding, as of
    `output.drafts_of`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    done: np.ndarray
    drafts: tuple[np.ndarray, ...] = ()


def batches(
    prompts: Sequence[str],
    seeds: Sequence[int],
    name: str,
    tokenizer: Tokenizer,
    *,
    prompt_lengths: Sequence[int],
    limit: int,
    batch_size: int,
    rows: Callable[[int, int], int] | None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(indices of the prompts in the first rows, int64; batch), in order of their lengths.

    Args:
      prompts: the texts.
      seeds: of each prompt.
      name: of the system, for a warning of how many prompts were cut.
      tokenizer: of the prompts.
      prompt_lengths: what prompts are padded to, ascending; the last is where they are cut.
      limit: the most new tokens; rows without a prompt have 0.
      batch_size: the most prompts in a batch.
      rows: (prompts in a batch, what they are padded to) -> its rows; None: always `batch_size`.
    """
    data = tokenized(prompts, name, tokenizer, prompt_lengths[-1])
    own_seeds = np.asarray(seeds, np.uint32)
    for places, batch in evaluation_batches(
        data,
        prompt_name="prompt",
        buckets=tuple((length, i + 1) for i, length in enumerate(prompt_lengths)),
        batch_size=batch_size,
    ):
        indices = places[places >= 0]
        ids, mask = batch["prompt_ids"], batch["prompt_mask"]
        count, size = len(indices), len(ids)
        if rows:
            size = rows(count, ids.shape[1])
        limits = np.where(np.arange(size) < count, limit, 0).astype(np.int32)
        row_seeds = np.zeros(size, np.uint32)
        row_seeds[:count] = own_seeds[indices]
        yield indices, Batch(ids[:size], mask[:size], limits, row_seeds)


def tokenized(
    prompts: Sequence[str], name: str, tokenizer: Tokenizer, most: int
) -> TokenizedExamples:
    """Prompts as ids, `most` of each; a warning that begins with `name` says how many were cut."""
    data = TokenizedExamples(
        [Example(prompt, "", ()) for prompt in prompts],
        prompt_tokenizer=tokenizer,
        response_tokenizer=tokenizer,
        max_prompt_tokens=most,
        max_response_tokens=1,
    )
    for line in data.loss.describe(most):
        log.warning("%s: %s", name, line)
    return data


def buckets(least: int, most: int, factor: int) -> tuple[int, ...]:
    """`least`, each `factor` times the one before, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= factor
    return (*sizes, most)


def search_of(
    system: System | Exact, search: Search, prompt_tokens: int, new_tokens: int
) -> Search:
    """A search as the system decodes, exactly or not.

    Raises:
      ValueError: it is exact and the system can't be, or a model lacks positions for the longest
        rows and a draft.
    """
    if not isinstance(system, Exact):
        if search.exact:
            raise ValueError(
                f"exact=True: the system {system.name} has no LLM to ask; expected one that was "
                "loaded with its whole LLM, as by load(..., exact=True)"
            )
        return search
    search = dataclasses.replace(search, exact=True)
    check_lengths(system, prompt_tokens, new_tokens, search.draft_tokens)
    return search


def check_lengths(
    system: System | Exact, prompt_tokens: int, new_tokens: int, draft_tokens: int = 0
) -> None:
    """Raises a ValueError if a model of the system lacks positions for the longest rows.

    `draft_tokens` are those of an Exact system, which are read beyond a response's last.
    """
    if isinstance(system, Exact):
        if draft_tokens > new_tokens:
            raise ValueError(
                f"draft_tokens={draft_tokens}: expected at most the {new_tokens} new tokens that a "
                "response may have"
            )
        for part in (system.l2s, system.llm):
            check_lengths(part, prompt_tokens, new_tokens + draft_tokens)
        return
    joint = isinstance(system, LlmToSlm)
    longest = "the longest of prompt_lengths (config.buckets)"
    # What a decoder-only SLM continues has a place per token of the LLM's, whatever the fusion.
    check_positions(
        system.decoder,
        prompt_tokens,
        new_tokens,
        where="slm" if joint else system.name,
        lower=f"max_new_tokens (config.decoding.max_new_tokens) or {longest}",
    )
    if joint:
        check_positions(system.llm_config, prompt_tokens, 0, where="llm", lower=longest)
