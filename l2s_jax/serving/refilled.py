"""Many prompts at once, in rows of which each takes the next prompt when its response has ended.

A batch is there until its longest response has ended, and most of its rows wait. Here they don't:
of responses whose lengths differ, as many rows make more per second.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from l2s_jax.cluster import distributed, sharding
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.text import asked
from l2s_jax.decoding.loop import EVERY, Decoded
from l2s_jax.models.exact import Exact
from l2s_jax.serving.batching import tokenized
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.output import Output, in_order, outputs_of
from l2s_jax.serving.programs import Programs, fewest
from l2s_jax.serving.request import Request
from l2s_jax.settings.search import Search

# With fewer prompts than so many batches, it takes longer to compile the programs of rows than they
# save.
WORTHWHILE = 4
# Of the rows, those that are read for together: fewer wait for others, more are read sooner.
_SHARE = 8


def can_refill(search: Search) -> bool:
    """Whether rows can stand at places of their own with that search."""
    return search.num_beams == 1 and not search.stop


def rows_for(prompts: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(rows that answer so many prompts, those of them that are read for together).

    `sizes` are those of `programs.sizes_of`.
    """
    rows = fewest(sizes, min(prompts, sizes[-1]))
    return rows, fewest(sizes, max(1, rows // _SHARE))


class Refilled:
    """Answers what a Generator answers, by the same settings, to the same texts."""

    def __init__(self, generator: Generator):
        self._generator = generator
        self._programs = Programs(generator, generator.batch_size, generator.search)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | None = None,
        description: str = "",
        mismatched: bool = False,
        shared: bool = False,
    ) -> list[Output]:
        """As `Generator.generate`, to which few prompts are left, and mismatched ones."""
        generator = self._generator
        settings: Any = {
            "max_new_tokens": max_new_tokens,
            "seeds": seeds,
            "description": description,
        }
        parted = shared and not generator.mesh.is_multi_process
        own = len(prompts) // (jax.process_count() if parted else 1)
        if mismatched or own < WORTHWHILE * generator.batch_size:
            return generator.generate(prompts, **settings, mismatched=mismatched, shared=shared)
        return in_order(lambda part: self.answered(prompts, **settings, part=part), parted)

    def answered(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | None = None,
        description: str = "",
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[list[int], list[Output]]]:
        """(places of prompts, their outputs) of responses that have ended, in the order of that.

        Arguments and errors as of `Generator.answered`, to which beam search, stop texts and exact
        decoding are left. A part is that of the prompts of each length.
        """
        generator, search = self._generator, self._generator.search
        if not can_refill(search) or isinstance(generator.system, Exact):
            yield from generator.answered(
                prompts,
                max_new_tokens=max_new_tokens,
                seeds=seeds,
                description=description,
                part=part,
            )
            return
        limit, _ = generator.limits(max_new_tokens)
        prompts, seeds = asked(prompts, seeds)
        data = tokenized(
            prompts, generator.system.name, generator.prompt_tokenizer, generator.prompt_lengths[-1]
        )
        total = len(prompts) // part[1]
        silent = not description or not distributed.is_primary()
        with tqdm(total=total, desc=description, disable=silent, file=sys.stderr) as bar:
            for places, width in self._lengths(data, part):
                for own, decoded in self._in_rows(data, places, seeds, width, limit):
                    bar.update(len(own))
                    yield own, list(outputs_of(decoded, generator.response_tokenizer))

    def _lengths(
        self, data: TokenizedExamples, part: tuple[int, int]
    ) -> Iterator[tuple[list[int], int]]:
        """(places of prompts, shorter ones first; tokens that they are padded to).

        Those that do not fill the rows are padded to the next length, with the prompts of that.
        """
        lengths, found = self._programs.lengths, data.prompt_lengths
        waiting: list[int] = []
        # A prompt may have no tokens: a tokenizer may know nothing of its text.
        for width, before in zip(lengths, (-1, *lengths), strict=False):
            own = np.flatnonzero((found > before) & (found <= width))
            own = own[np.argsort(found[own], kind="stable")][part[0] :: part[1]]
            waiting += own.tolist()
            if waiting and (len(waiting) >= self._generator.batch_size or width == lengths[-1]):
                yield waiting, width
                waiting = []

    def _in_rows(
        self,
        data: TokenizedExamples,
        places: list[int],
        seeds: Sequence[int],
        width: int,
        limit: int,
    ) -> Iterator[tuple[list[int], Decoded]]:
        """(places, responses) of what has ended since it was last asked for, until all has."""
        generator, programs = self._generator, self._programs
        size, together = rows_for(len(places), programs.sizes)
        waiting = deque(places)
        rows: list[int | None] = [None] * size  # whose place each is
        slots: Any = None
        ended = None

        def read(chosen: Sequence[int]) -> Any:
            requests = [
                Request(data[i][0].tolist(), generator.search, limit, seeds[i]) for i in chosen
            ]
            return programs.read(requests, width, rows=together, room=width)

        while waiting or any(place is not None for place in rows):
            free = [row for row, place in enumerate(rows) if place is None]
            while waiting and len(free) >= together:
                chosen = [waiting.popleft() for _ in range(min(together, len(waiting)))]
                new, into, free = read(chosen), free[: len(chosen)], free[len(chosen) :]
                slots = programs.insert(slots or programs.empty(new, size), new, into)
                for row, place in zip(into, chosen, strict=True):
                    rows[row] = place
            nobody = np.array([place is None for place in rows])
            slots, said = programs.advance(slots, nobody, EVERY, together if waiting else size)
            if ended:
                yield ended  # while the devices decode
            said = sharding.gather(said.replace(scores=None))
            done = np.flatnonzero(said.done & ~nobody)
            ended = (
                [place for row in done if (place := rows[row]) is not None],
                Decoded(said.tokens.T[done], said.lengths[done], said.finished[done]),
            )
            rows = [None if said.done[row] else place for row, place in enumerate(rows)]
        if ended:
            yield ended
