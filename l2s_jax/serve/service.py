"""Between the event loop and the thread that owns the device: requests in, pieces out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from l2s_jax.serve.errors import Refused
from l2s_jax.serve.metrics import Metrics
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.lane import Lane
from l2s_jax.serving.request import Job, Piece, Request
from l2s_jax.serving.scheduler import Full, Scheduler, Stopped

T = TypeVar("T")

# Threads that tokenize.
_TOKENIZING = 2
_RETRY_S = "1"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests may ask of a server.

    slots: responses of one model that are decoded side by side. max_waiting: others that may wait,
    of all models. pause_s: for how long prompts may be read while others are answered. time_s: of a
    request. body_bytes: of a request. api_key: "" is none.
    """

    slots: int = 32
    max_waiting: int = 256
    pause_s: float = 1.0
    time_s: float = 600.0
    body_bytes: int = 1 << 20
    api_key: str = ""


class Service:
    """Models by name, once they are warm, and what a request has to pass.

    Attributes:
      state: "starting", "ready" or "stopping".
      examples: prompts that the page offers.
      created: when it began, in seconds of the epoch.
    """

    def __init__(self, limits: Limits, examples: Sequence[str] = ()):
        self.limits, self.examples = limits, tuple(examples)
        self.state = "starting"
        self.created = int(time.time())
        self.generators: dict[str, Generator] = {}
        self._lanes: dict[str, Lane] = {}
        self._scheduler: Scheduler | None = None
        self._post: _Post | None = None
        self._pool = ThreadPoolExecutor(_TOKENIZING, "tokenize")
        self.metrics = Metrics(lambda: self._lanes)

    def start(
        self, generators: Mapping[str, Generator], on_end: Callable[[str], None] = lambda _: None
    ) -> None:
        """Warms up, which takes a while, and is ready.

        on_end: as of Scheduler.

        Raises:
          ValueError: a mesh does not split the slots.
        """
        lanes = {name: Lane(one, self.limits.slots) for name, one in generators.items()}
        for lane in lanes.values():
            lane.warm_up()
        self.generators, self._lanes = dict(generators), lanes
        self._scheduler = Scheduler(
            lanes,
            max_waiting=self.limits.max_waiting,
            pause_s=self.limits.pause_s,
            on_end=on_end,
        )
        if self.state == "starting":
            self.state = "ready"

    def stop(self, drain_s: float) -> None:
        """Takes no more requests, and waits for those that there are, at most so many seconds."""
        self.state = "stopping"
        if self._scheduler:
            self._scheduler.stop(drain_s)

    def generator(self, name: str) -> Generator:
        """The one of a model's name.

        Raises:
          Refused: there is none of that name, or it is not ready.
        """
        if self.state == "starting":
            raise Refused(
                503, "the server is starting", code="starting", headers={"Retry-After": "5"}
            )
        if self.state != "ready":
            raise _stopping()
        if name not in self.generators:
            raise Refused(
                404,
                f"model={name!r}: no such model; expected one of {', '.join(self.generators)}",
                param="model",
                code="model_not_found",
            )
        return self.generators[name]

    async def tokenized(self, work: Callable[..., T], *arguments: Any) -> T:
        """What a function of tokenizers gives, which runs beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def ask(self, model: str, requests: Sequence[Request], prompt_tokens: int) -> Answers:
        """Submits the requests of one client, of whose prompts each has its tokens counted once.

        Raises:
          Refused: as many wait as may, or would, or the server is stopping.
        """
        assert self._scheduler
        most = self.limits.slots + self.limits.max_waiting
        if len(requests) > most:
            raise Refused(
                400, f"{len(requests)} choices in all: expected at most {most}", param="n"
            )
        if self._post is None:
            self._post = _Post(asyncio.get_running_loop())
        answers = Answers(self, model, self._post)
        try:
            for request in requests:
                answers.add(self._scheduler, request)
        except (Full, Stopped) as error:
            answers.cancel()
            if isinstance(error, Stopped):
                raise _stopping() from None
            raise Refused(
                429,
                f"{self.limits.max_waiting} requests are waiting already",
                code="queue_full",
                headers={"Retry-After": _RETRY_S},
            ) from None
        self.metrics.read(model, prompt_tokens)
        return answers


class _Post:
    """Takes pieces from the device's thread to the event loop, which wakes up once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._letters: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._called = False

    def send(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Puts an item into a queue of the loop; for any thread."""
        self._letters.append((queue, item))
        if not self._called:
            self._called = True
            # Nobody listens any more where the loop has been closed.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        # First of all: who sends from here on calls again.
        self._called = False
        while self._letters:
            queue, item = self._letters.popleft()
            queue.put_nowait(item)


class Answers:
    """Responses on their way: iterate over (index, piece), as they come."""

    def __init__(self, service: Service, model: str, post: _Post):
        self._service, self._model, self._post = service, model, post
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._open: set[int] = set()

    def add(self, scheduler: Scheduler, request: Request) -> None:
        """Submits one more; raises as of Scheduler.submit."""
        index = len(self._jobs)

        def deliver(piece: Piece) -> None:
            self._post.send(self._queue, (index, piece))

        self._jobs.append(scheduler.submit(self._model, request, deliver))
        self._open.add(index)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """
        Raises:
          Refused: one of the responses could not be given, or not in time.
        """
        while self._open:
            index, piece = await self._queue.get()
            if index not in self._open:
                continue
            if piece.end:
                self._open.discard(index)
                self._count(self._jobs[index], piece)
            if piece.end in _FAILURES:
                raise _failure(piece, self._service.limits.time_s)
            yield index, piece

    def cancel(self) -> None:
        """Ends those that have not ended: nobody waits for them."""
        for index in self._open:
            self._jobs[index].cancel()

    def _count(self, job: Job, piece: Piece) -> None:
        first_s = None if job.began is None else job.began - job.arrived
        whole_s = time.monotonic() - job.arrived
        self._service.metrics.ended(self._model, piece.tokens, first_s, whole_s, piece.drafts)


def _stopping() -> Refused:
    return Refused(
        503, "the server is stopping", code="stopping", headers={"Retry-After": _RETRY_S}
    )


_FAILURES = ("cancelled", "time", "error")


def _failure(piece: Piece, time_s: float) -> Refused:
    if piece.end == "time":
        return Refused(504, f"not answered within {time_s:g} seconds", code="timeout")
    if piece.end == "cancelled":
        return _stopping()
    return Refused(500, piece.reason, code="failed")
