"""One system's requests on the device: slots that they join and leave between chunks of tokens."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2s_jax.decoding.loop import CHUNK
from l2s_jax.decoding.slots import Said, Slots
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.programs import Programs
from l2s_jax.serving.request import Job, Piece, Request

log = logging.getLogger(__name__)

# Seconds of decoding between two looks at who comes and goes; after prompts were read, that their
# first tokens are there soon; and the share of those being answered that end it when they end.
_CHUNK_S = 0.02
_FIRST_CHUNK_S = 0.01
_DONE_SHARE = 4
# Where several responses have ended at once, the next prompts are waited for, to be read together:
# for at most this share of what reading one takes.
_GATHER_SHARE = 0.25
# Of the time that was spent on reading, what is decoded before prompts are read again; or a chunk,
# so that small models read prompts together, too.
_OWED_SHARE = 0.5
# Turns that fewer slots would have done for, before there are fewer.
PATIENCE = 8


class NotRead(RuntimeError):
    """Prompts could not be read; those that are being answered are as they were."""


class _News(NamedTuple):
    """What a row has said, and whose it was."""

    job: Job
    said: Said
    row: int


class Lane:
    """What a Generator answers, request by request, in slots.

    All but `submit`, `waiting` and the counts is for the one thread that owns the device.
    """

    def __init__(self, generator: Generator, max_slots: int):
        """Raises a ValueError if the mesh does not split so many slots."""
        self.generator = generator
        self.waiting: deque[Job] = deque()
        self._programs = Programs(generator, max_slots)
        self._slots: Any = None
        self._jobs: list[Job | None] = []  # of each slot
        self._patience = PATIENCE
        self._owed_s = 0.0  # of decoding, before prompts are read again
        self._ended = 0  # of those whose slots were freed last
        self._untold: deque[_News] = deque()

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
        return self._most - self.running - len(self.waiting)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._untold or self.running)

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Job:
        """A request at the end of the queue."""
        job = Job(request, deliver, self.generator.response_tokenizer)
        self.waiting.append(job)
        return job

    def warm_up(self) -> None:
        """Compiles every program, and measures what they take."""
        self._programs.warm_up()

    def turn(self, pause_s: float) -> None:
        """Brings in who waits, decodes a chunk, and meanwhile delivers what was said before it.

        pause_s: for how long prompts may be read while others are being answered, or for as long as
          the first of them has waited. One is read however long it takes.

        Raises:
          NotRead: a step of reading failed; those whose prompts it read have been told.
          Exception: another step failed, and what slots hold is lost: `abandon` goes on from there.
        """
        self._gather()
        self._leave()
        joining = self._next(pause_s)
        if joining:
            self._join(joining)
        else:
            self._fit(self.running)
        began, said = time.monotonic(), None
        if self.running:
            said = self._advance(first=bool(joining))
        self._tell()
        if said is not None:
            steps = self._hear(said)
            if not joining:  # or the time would be that of reading, too
                self._programs.measured(self.size, steps, time.monotonic() - began)
            self._owed_s -= steps * self._programs.step_s[self.size]

    def abandon(self, reason: str) -> None:
        """Ends all that have a slot, after a step that failed."""
        self._tell()
        self._end(self._jobs, "error", reason)
        self._jobs, self._slots = [], None

    def end_all(self, end: str, reason: str = "") -> None:
        """Ends all requests, after those whose responses are there have heard them."""
        self._tell()
        self._end([*self.waiting, *self._jobs], end, reason)

    def _tell(self) -> None:
        """Delivers what rows have said; one that can't be delivered ends its own request only."""
        while self._untold:
            job, said, row = self._untold.popleft()
            try:
                job.tell(said, row)
            except Exception:
                log.exception("a response could not be delivered")
                job.stop("error", "the response could not be written")

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

    def _gather(self) -> None:
        """Waits a little for the next prompts of those who have just been answered together."""
        if self.running or not self.waiting:
            return
        length = self._programs.length_for(self.waiting[0].request)
        alone_s = self._programs.read_s[self._programs.sizes[0], length]
        until = time.monotonic() + _GATHER_SHARE * alone_s
        while len(self.waiting) < self._ended and time.monotonic() < until:
            time.sleep(alone_s / 100)
        self._ended = 0

    def _next(self, pause_s: float) -> list[Job]:
        """Those that are read now: the first in the queue, and others that are read with it.

        Of programs that would do, it is the one that reads the most prompts per second. Those who
        are being answered are owed time for what was last spent on reading, so that they go on, and
        that prompts are read together.
        """
        running, programs = self.running, self._programs
        room = self._most - running
        if not self.waiting or not room or (running and self._owed_s > 0):
            return []
        waiting, least = list(self.waiting), programs.length_for(self.waiting[0].request)
        pause_s = max(pause_s, time.monotonic() - waiting[0].arrived)
        chosen, best = waiting[:1], 0.0
        for length in programs.lengths:
            if length < least:
                continue
            fit = (job for job in waiting if programs.length_for(job.request) <= length)
            fits = list(itertools.islice(fit, room))
            for size in programs.sizes:
                read_s, number = programs.read_s[size, length], min(size, len(fits))
                if number / read_s >= best and not (running and read_s > pause_s):
                    chosen, best = fits[:number], number / read_s
        for job in chosen:
            self.waiting.remove(job)
        return chosen

    @property
    def _most(self) -> int:
        return self._programs.sizes[-1]

    def _join(self, joining: list[Job]) -> None:
        """Reads prompts, and puts them into slots."""
        programs = self._programs
        length = max(programs.length_for(job.request) for job in joining)
        try:
            read = programs.read([job.request for job in joining], length)
        except Exception as error:
            self._end(joining, "error", "the prompt could not be read")
            raise NotRead(str(error)) from error
        if self.running:
            try:
                self._insert(joining, read)
            except Exception:
                self._end(joining, "error", "the model failed at a step")
                raise
        else:
            self._slots, empty = read, len(read.fresh) - len(joining)
            self._jobs = [*joining, *[None] * empty]
        # The fewer they are that pause beside those that wait, the less they are owed.
        share = min(1.0, self.running / max(1, len(self.waiting)))
        read_s = programs.read_s[programs.size_for(len(joining)), length]
        self._owed_s = max(_OWED_SHARE * share * read_s, _CHUNK_S)

    def _insert(self, joining: list[Job], read: Slots) -> None:
        self._fit(self.running + len(joining))
        free = [slot for slot, job in enumerate(self._jobs) if job is None][: len(joining)]
        self._slots = self._programs.insert(self._slots, read, free)
        for slot, job in zip(free, joining, strict=True):
            self._jobs[slot] = job

    def _fit(self, needed: int) -> None:
        """Brings those that have a slot into as few slots as there are programs for."""
        if not self.running:
            return
        size = self._programs.size_for(needed)
        self._patience = PATIENCE if size >= len(self._jobs) else self._patience - 1
        if size > len(self._jobs) or self._patience <= 0:
            kept = [slot for slot, job in enumerate(self._jobs) if job is not None]
            self._slots = self._programs.regroup(self._slots, kept, size)
            self._jobs = [self._jobs[slot] for slot in kept] + [None] * (size - len(kept))
            self._patience = PATIENCE

    def _advance(self, *, first: bool) -> Said:
        """A chunk, which is short where somebody waits for a first token, or hears a stream."""
        step_s = self._programs.step_s[self.size]
        steps = max(1, round((_FIRST_CHUNK_S if first else _CHUNK_S) / step_s))
        if any(job is not None and job.request.streamed for job in self._jobs):
            steps = min(steps, CHUNK)  # as `Generator.stream` has it
        ended = np.array([job is None or job.ended for job in self._jobs])
        enough = max(1, self.running // _DONE_SHARE)
        self._slots, said = self._programs.advance(self._slots, ended, steps, enough)
        return said

    def _hear(self, said: Said) -> int:
        """Waits for a chunk, and frees the slots of those that are done; the steps it made."""
        scored = any(job is not None and job.request.scored for job in self._jobs)
        said = jax.device_get(said if scored else said.replace(scores=None))
        running = self.running
        for slot, job in enumerate(self._jobs):
            if job is not None:
                self._untold.append(_News(job, said, slot))
                if said.done[slot] or job.ended:
                    self._jobs[slot] = None
        self._ended = running - self.running or self._ended
        return int(said.steps)
