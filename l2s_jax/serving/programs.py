"""The programs that answer the requests of one system, each compiled once for every shape."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from l2s_jax.cluster import sharding
from l2s_jax.decoding import slots
from l2s_jax.decoding.choices import choices_of
from l2s_jax.decoding.exact import ExactLoop
from l2s_jax.decoding.slots import Said, SlotLoop, Slots
from l2s_jax.models.exact import Exact
from l2s_jax.serving.batching import buckets
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.request import Request
from l2s_jax.settings.search import Search

# Of what a step took before, how much still counts after a chunk.
_MEMORY = 0.8
# Of a prompt that stands for none.
_NOBODY = Request((0,), Search(), 0)
# Steps that are measured before there are any requests.
_STEPS = 32


def sizes_of(max_slots: int, ways: int) -> tuple[int, ...]:
    """Numbers of slots, ascending, that a mesh splits in so many ways."""
    sizes = buckets(ways, max_slots, 2)
    if max_slots % (16 * ways) == 0:
        # Under load some slots are always empty, between two requests.
        sizes = tuple(sorted({*sizes, max_slots // 4 * 3}))
    return sizes


def fewest(sizes: Sequence[int], rows: int) -> int:
    """The smallest of ascending sizes that is at least `rows`."""
    return next(size for size in sizes if size >= rows)


class Programs:
    """What `decoding.slots` does, for the shapes of one Generator.

    Attributes:
      sizes: numbers of slots, and of prompts that are read at once, ascending.
      lengths: tokens of prompts, ascending.
      read_s: what reading (prompts, tokens each) takes, in seconds, as measured by `warm_up`.
      step_s: what a step of so many slots takes, in seconds; of exact decoding, a block.
    """

    def __init__(self, generator: Generator, max_slots: int, search: Search | None = None):
        """`search` is that of all requests, if they have the same.

        Raises:
          ValueError: the mesh does not split so many slots.
        """
        sharding.check_rows(max_slots, generator.mesh, "slots")
        system, capacity = generator.system, generator.max_new_tokens
        self._generator = generator
        self._loop: SlotLoop | ExactLoop = (
            ExactLoop(system, generator.end_ids, capacity, generator.search)
            if isinstance(system, Exact)
            else SlotLoop(system, generator.end_ids, capacity, search)
        )
        self.sizes = sizes_of(max_slots, sharding.batch_ways(generator.mesh))
        self.lengths = tuple(generator.prompt_lengths)
        self.read_s: dict[tuple[int, int], float] = {}
        self.step_s: dict[int, float] = {}

    def size_for(self, rows: int) -> int:
        """The fewest slots that hold so many."""
        return fewest(self.sizes, rows)

    def length_for(self, request: Request) -> int:
        """The shortest length that a prompt is read in."""
        return next(length for length in self.lengths if length >= len(request.prompt))

    def read(self, asked: Sequence[Request], length: int, rows: int = 0, room: int = 0) -> Slots:
        """Prompts in slots of their own.

        Args:
          asked: the prompts, and how they are answered.
          length: tokens that they are padded to.
          rows: slots; 0: as many as `size_for` says.
          room: tokens of prompts that there is room for; 0: those of the longest.
        """
        generator, rows = self._generator, rows or self.size_for(len(asked))
        asked = [*asked, *[_NOBODY] * (rows - len(asked))]
        ids = np.full((rows, length), generator.prompt_tokenizer.pad_id, np.int32)
        mask = np.zeros((rows, length), bool)
        for row, request in enumerate(asked):
            ids[row, : len(request.prompt)] = request.prompt
            mask[row, : len(request.prompt)] = True
        arguments: Any = (
            ids,
            mask,
            np.array([request.limit for request in asked], np.int32),
            np.array([request.seed for request in asked], np.uint32),
            choices_of([request.search for request in asked]),
            np.array([request.scored for request in asked]),
        )
        with jax.set_mesh(generator.mesh):
            if generator.mesh.size > 1:
                arguments = sharding.put(arguments, sharding.batch_sharding(generator.mesh))
            return slots.read(
                self._loop,
                generator.trained,
                generator.frozen,
                *arguments,
                prompt_slots=room or self.lengths[-1],
            )

    def insert(self, old: Slots, new: Slots, places: Sequence[int]) -> Slots:
        """The slots with the first rows of `new` in these places; `old` is used up."""
        size = len(old.fresh)
        where = np.full(len(new.fresh), size, np.int32)
        where[: len(places)] = places
        with jax.set_mesh(self._generator.mesh):
            return slots.insert(old, new, where)

    def empty(self, like: Slots, size: int) -> Slots:
        """So many slots that nobody has, with the shapes of others."""
        with jax.set_mesh(self._generator.mesh):
            return slots.regroup(like, np.full(size, -1, np.int32))

    def regroup(self, old: Slots, kept: Sequence[int], size: int) -> Slots:
        """So many slots, of which the first are these of before."""
        # From one size to the next: a program for every pair would be many.
        first, last = (self.sizes.index(number) for number in (len(old.fresh), size))
        way = range(first, last, 1 if last > first else -1)
        with jax.set_mesh(self._generator.mesh):
            for place in way:
                reached = self.sizes[place + way.step]
                old = slots.regroup(old, np.array([*kept, *[-1] * (reached - len(kept))], np.int32))
                kept = range(len(kept))
        return old

    def advance(self, old: Slots, ended: np.ndarray, steps: int, enough: int) -> tuple[Slots, Said]:
        """Arguments as of slots.advance; `old` is used up."""
        generator = self._generator
        with jax.set_mesh(generator.mesh):
            return slots.advance(
                self._loop,
                generator.trained,
                generator.frozen,
                old,
                ended,
                np.int32(steps),
                np.int32(enough),
            )

    def measured(self, size: int, steps: int, seconds: float) -> None:
        """Corrects what a step takes by some that were made."""
        if steps:
            before = self.step_s.setdefault(size, seconds / steps)
            self.step_s[size] = _MEMORY * before + (1 - _MEMORY) * seconds / steps

    def warm_up(self) -> None:
        """Compiles every program, and measures what they take."""
        asked = Search(min_new_tokens=self._generator.max_new_tokens)
        somebody = Request((0,), asked, self._generator.max_new_tokens)
        shapes, shortest = list(itertools.product(self.sizes, self.lengths)), self.lengths[0]
        short: dict[int, Slots] = {}  # read of the shortest prompts, by their number

        def read(shape: tuple[int, int]) -> Slots:
            rows, length = shape
            return jax.block_until_ready(self.read([somebody] * rows, length))

        def advance(old: Slots) -> tuple[Slots, Said]:
            size = len(old.fresh)
            return jax.block_until_ready(self.advance(old, np.zeros(size, bool), _STEPS, size))

        def use(size: int) -> None:
            own, place = read((size, shortest)), self.sizes.index(size)
            for other in self.sizes[: place + 1]:
                own = self.insert(own, short[other], range(other))
            for other in self.sizes[max(place - 1, 0) : place + 2]:
                self.regroup(own, [], other)
            advance(own)

        with (
            tqdm(total=len(shapes) + len(self.sizes), desc="compiling", file=sys.stderr) as bar,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for (rows, length), made in zip(shapes, pool.map(read, shapes), strict=True):
                if length == shortest:
                    short[rows] = made
                bar.update()
            for _ in pool.map(use, self.sizes):
                bar.update()
        for shape in shapes:
            began = time.monotonic()
            read(shape)
            self.read_s[shape] = time.monotonic() - began
        for size in self.sizes:
            own = read((size, shortest))
            began = time.monotonic()
            _, said = advance(own)
            self.measured(size, int(said.steps), time.monotonic() - began)
