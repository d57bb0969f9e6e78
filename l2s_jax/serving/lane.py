"""One system's requests on the device: slots that they join and leave between chunks of tokens."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from l2s_jax.cluster import sharding
from l2s_jax.decoding import slots
from l2s_jax.decoding.choices import choices_of
from l2s_jax.decoding.exact import ExactLoop
from l2s_jax.decoding.slots import Said, SlotLoop
from l2s_jax.models.exact import Exact
from l2s_jax.serving.batching import buckets
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.request import Job, Piece, Request
from l2s_jax.settings.search import Search

# Steps between two looks at who comes and goes.
CHUNK = 4
# Turns that fewer slots would have done for, before there are fewer.
PATIENCE = 8
# Of a prompt that stands for none.
_NOBODY = Request((0,), Search(), 0)


class NotRead(RuntimeError):
    """Prompts could not be read; those that are being answered are as they were."""


class _News(NamedTuple):
    """What rows have said, and whose they were."""

    jobs: Sequence[Job | None]
    said: Said

    def tell(self) -> None:
        said = jax.device_get(self.said)
        for row, job in enumerate(self.jobs):
            if job is not None:
                job.tell(said, row)


class Lane:
    """What a Generator answers, request by request, in slots.

    Attributes:
      sizes: numbers of slots that programs are compiled for, ascending.
      reads: numbers of prompts that are read at once, ascending.
      read_s: what reading (prompts, tokens each) takes, in seconds, as measured by `warm_up`.

    All but `submit`, `waiting` and the counts is for the one thread that owns the device.
    """

    def __init__(self, generator: Generator, max_slots: int):
        """Raises a ValueError if the mesh does not split so many slots."""
        sharding.check_rows(max_slots, generator.mesh, "slots")
        system, capacity = generator.system, generator.max_new_tokens
        self.generator = generator
        self._loop: SlotLoop | ExactLoop = (
            ExactLoop(system, generator.end_ids, capacity, generator.search)
            if isinstance(system, Exact)
            else SlotLoop(system, generator.end_ids, capacity, CHUNK)
        )
        self.sizes = buckets(sharding.batch_ways(generator.mesh), max_slots, 4)
        self.reads = self.sizes
        self.read_s: dict[tuple[int, int], float] = {}
        self.waiting: deque[Job] = deque()
        self._jobs: list[Job | None] = []  # of each slot
        self._state: Any = None
        self._blank: Any = None  # a state of the fewest slots, all empty
        self._patience = PATIENCE
        self._untold: list[_News] = []

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return sum(job is not None for job in self._jobs)

    @property
    def size(self) -> int:
        """How many slots the program has that decodes now."""
        return len(self._jobs)

    @property
    def spare(self) -> int:
        """Slots that nobody has or waits for; below 0, how many requests find none."""
        return self.sizes[-1] - self.running - len(self.waiting)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._untold or self.running)

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Job:
        """A request at the end of the queue."""
        job = Job(request, deliver, self.generator.response_tokenizer)
        self.waiting.append(job)
        return job

    def warm_up(self) -> int:
        """Compiles every program, measures how long reading takes; the number of programs."""
        shapes = [(rows, length) for length in self.generator.prompt_lengths for rows in self.reads]
        count = len(shapes) + len(self.sizes) * (1 + len(self.reads) + len(self.sizes))
        with tqdm(total=count, desc="compiling", file=sys.stderr) as bar:
            read = {}
            for rows, length in shapes:
                for _ in range(2):  # the second is measured
                    began = time.monotonic()
                    read[rows], said = self._read([], rows, length)
                    jax.block_until_ready(said)
                    self.read_s[rows, length] = time.monotonic() - began
                bar.update()
            self._blank = self._regrouped(read[self.reads[0]], [-1] * self.sizes[0])
            for size in self.sizes:
                self._state = self._regrouped(self._blank, [-1] * size)
                for rows in self.reads:
                    self._insert(read[rows], np.full(rows, size, np.int32))
                    bar.update()
                jax.block_until_ready(self._advance(np.zeros(size, bool)))
                bar.update()
                for other in self.sizes:
                    self._regrouped(self._state, [-1] * other)
                    bar.update()
        self._empty()
        return count

    def turn(self, pause_s: float) -> None:
        """Brings in who waits, decodes a chunk, and meanwhile delivers what was said before it.

        pause_s: for how long prompts may be read while others are being answered. One is read
          however long it takes.

        Raises:
          NotRead: a step of reading failed; those whose prompts it read have been told.
          Exception: another step failed, and what slots hold is lost: `abandon` goes on from there.
        """
        self._leave()
        joining = self._next(pause_s)
        self._fit(len(joining))
        if joining:
            self._join(joining)
        said = None
        if self.running:
            said = self._advance(self._ended())
        untold, self._untold = self._untold, []
        for news in untold:
            news.tell()
        if said is not None:
            self._hear(said)

    def abandon(self, reason: str) -> None:
        """Ends all that have a slot, after a step that failed, and makes new slots.

        Raises:
          Exception: as of JAX, where the device takes none.
        """
        self._end(self._jobs, "error", reason)
        self._untold = []
        self._empty()

    def end_all(self, end: str, reason: str = "") -> None:
        """Ends all requests."""
        self._end([*self.waiting, *self._jobs], end, reason)

    def _end(self, jobs: Sequence[Job | None], end: str, reason: str) -> None:
        for job in jobs:
            if job is not None:
                job.stop(end, reason)

    def _leave(self) -> None:
        """Ends those that nobody waits for any more, before they have a slot or in it."""
        now = time.monotonic()
        for job in list(self.waiting):
            if (end := job.overdue(now)) or job.ended:
                self.waiting.remove(job)
                job.stop(end)
        for job in self._jobs:
            if job is not None and (end := job.overdue(now)):
                job.stop(end)

    def _next(self, pause_s: float) -> list[Job]:
        """Those that are read now: the first in the queue, and others that are read with it."""
        if not self.waiting:
            return []
        running = self.running
        room = self.sizes[-1] - running
        if not room:
            return []
        length = self._bucket(self.waiting[0])
        most = [
            rows
            for rows in self.reads
            if not running or self.read_s.get((rows, length), 0) <= pause_s
        ]
        room = min(room, most[-1] if most else 1)
        fits = [job for job in list(self.waiting) if self._bucket(job) <= length]
        chosen = fits[:room]
        for job in chosen:
            self.waiting.remove(job)
        return chosen

    def _bucket(self, job: Job) -> int:
        tokens = len(job.request.prompt)
        return next(length for length in self.generator.prompt_lengths if length >= tokens)

    def _fit(self, joining: int) -> None:
        """Brings requests into as few slots as there are programs for."""
        needed = self.running + joining
        if not needed:
            return
        size = next(size for size in self.sizes if size >= needed)
        self._patience = PATIENCE if size >= len(self._jobs) else self._patience - 1
        if size < len(self._jobs) and self.running and self._patience > 0:
            return
        if size != len(self._jobs):
            kept = [slot for slot, job in enumerate(self._jobs) if job is not None]
            self._state = self._regrouped(
                self._state if kept else self._blank, kept + [-1] * (size - len(kept))
            )
            self._jobs = [self._jobs[slot] for slot in kept] + [None] * (size - len(kept))
            self._patience = PATIENCE

    def _join(self, joining: list[Job]) -> None:
        rows = next(rows for rows in self.reads if rows >= len(joining))
        try:
            state, said = self._read(joining, rows, max(map(self._bucket, joining)))
        except Exception as error:
            self._end(joining, "error", "the prompt could not be read")
            raise NotRead(str(error)) from error
        free = [slot for slot, job in enumerate(self._jobs) if job is None]
        places = np.full(rows, len(self._jobs), np.int32)
        for row, (job, slot) in enumerate(zip(joining, free, strict=False)):
            self._jobs[slot] = job
            places[row] = slot
        self._insert(state, places)
        self._untold.append(_News(joining, said))

    def _read(self, joining: list[Job], rows: int, length: int) -> tuple[Any, Said]:
        asked = [job.request for job in joining] + [_NOBODY] * (rows - len(joining))
        ids = np.full((rows, length), self.generator.prompt_tokenizer.pad_id, np.int32)
        mask = np.zeros((rows, length), bool)
        for row, request in enumerate(asked):
            ids[row, : len(request.prompt)] = request.prompt
            mask[row, : len(request.prompt)] = True
        arguments = (
            ids,
            mask,
            np.array([request.limit for request in asked], np.int32),
            np.array([request.seed for request in asked], np.uint32),
            choices_of([request.search for request in asked]),
            np.array([request.scored for request in asked]),
        )
        generator = self.generator
        with jax.set_mesh(generator.mesh):
            placed = sharding.put(arguments, sharding.batch_sharding(generator.mesh))
            return slots.read(
                self._loop,
                generator.trained,
                generator.frozen,
                *placed,
                prompt_slots=generator.prompt_lengths[-1],
            )

    def _advance(self, ended: np.ndarray) -> Said:
        generator = self.generator
        with jax.set_mesh(generator.mesh):
            self._state, said = slots.advance(
                self._loop, generator.trained, generator.frozen, self._state, ended
            )
        return said

    def _ended(self) -> np.ndarray:
        return np.array([job is None or job.ended for job in self._jobs])

    def _hear(self, said: Said) -> None:
        """Waits for a chunk, and frees the slots of those that are done."""
        said = jax.device_get(said)
        self._untold.append(_News(tuple(self._jobs), said))
        for slot, job in enumerate(self._jobs):
            if job is not None and (said.done[slot] or job.ended):
                self._jobs[slot] = None

    def _insert(self, state: Any, places: np.ndarray) -> None:
        with jax.set_mesh(self.generator.mesh):
            self._state = slots.insert(self._state, state, places)

    def _empty(self) -> None:
        """The fewest slots, all empty."""
        size = self.sizes[0]
        self._state = self._regrouped(self._blank, [-1] * size)
        self._jobs = [None] * size

    def _regrouped(self, state: Any, kept: list[int]) -> Any:
        with jax.set_mesh(self.generator.mesh):
            return slots.regroup(state, np.array(kept, np.int32))
