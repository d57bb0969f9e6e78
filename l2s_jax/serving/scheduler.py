"""The one thread that owns the device, and the bounded queues in front of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from l2s_jax.serving.lane import Lane, NotRead
from l2s_jax.serving.request import Job, Piece, Request

log = logging.getLogger(__name__)

# Steps that fail one after the other, after which the device counts as gone.
_FAILURES = 3


class Full(Exception):
    """The queue holds as many requests as it may."""


class Stopped(Exception):
    """No more requests are taken."""


class Scheduler:
    """Lanes by name, which take turns on the device.

    `submit` and `Job.cancel` are for any thread; pieces are delivered by the thread of the
    scheduler, which waits for `deliver` to return.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        *,
        max_waiting: int,
        pause_s: float,
        on_end: Callable[[str], None] = lambda reason: None,
    ):
        """
        Args:
          lanes: that have been warmed up.
          max_waiting: requests that may wait for a slot that others have, of all lanes together.
          pause_s: for how long prompts may be read while others are being answered.
          on_end: called once, from the scheduler's thread, when that ends: with "" after `stop`,
            else with what was wrong with the device.
        """
        self.lanes = dict(lanes)
        self._max_waiting = max_waiting
        self._pause_s = pause_s
        self._on_end = on_end
        self._wake = threading.Condition()
        self._stopping = False
        self._cut = False  # those that are still being answered are ended
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return sum(len(lane.waiting) for lane in self.lanes.values())

    def submit(self, lane: str, request: Request, deliver: Callable[[Piece], None]) -> Job:
        """Puts a request at the end of a lane's queue; its pieces go to `deliver`.

        Raises:
          Full: as many wait as may.
          Stopped: the scheduler is stopping, or has stopped.
        """
        with self._wake:
            if self._stopping:
                raise Stopped
            if self.lanes[lane].spare <= 0 and self._queued() >= self._max_waiting:
                raise Full
            job = self.lanes[lane].submit(request, deliver)
            self._wake.notify()
        return job

    def _queued(self) -> int:
        """How many requests wait for a slot that others have."""
        return sum(max(0, -lane.spare) for lane in self.lanes.values())

    def stop(self, drain_s: float) -> None:
        """Takes no more requests, answers those that there are, for at most so many seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(drain_s)
        self._cut = True
        self._thread.join()

    def _end_all(self, end: str, reason: str = "") -> None:
        for lane in self.lanes.values():
            lane.end_all(end, reason)

    def _run(self) -> None:
        reason = ""
        while not reason and not self._cut:
            with self._wake:
                busy = [lane for lane in self.lanes.values() if lane.busy]
                if not busy:
                    if self._stopping:
                        break
                    self._wake.wait()
                    continue
            for lane in busy:
                if reason := self._turn(lane):
                    break
        with self._wake:
            self._stopping = True
        if reason:
            self._end_all("error", "the device is gone")
        else:
            self._end_all("cancelled")
        self._on_end(reason)

    def _turn(self, lane: Lane) -> str:
        """A turn of a lane; why the device counts as gone, or ""."""
        try:
            lane.turn(self._pause_s)
        except Exception as error:
            # Whatever a step may raise: those concerned are told, and the next ones are served.
            log.exception("a step failed")
            self._failures += 1
            if self._failures >= _FAILURES:
                return f"{type(error).__name__}: {error}"
            try:
                if not isinstance(error, NotRead):
                    lane.abandon("the model failed at a step")
            except Exception as again:
                return f"{type(again).__name__}: {again}"
            return ""
        self._failures = 0
        return ""
