"""When a training is saved by the clock, at the same steps in all processes."""

from __future__ import annotations

import time

from l2s_jax.cluster import distributed

_AHEAD = 0.25


class Clock:
    """Process 0's clock. The others ask it now and then, and not at every step."""

    def __init__(self, minutes: float, step: int):
        """`minutes` from one save to the next; 0: none by the clock. `step`: the last one made."""
        self._seconds = 60 * minutes
        self.restart(step)

    def restart(self, step: int) -> None:
        """Something was saved after `step`."""
        self._saved = time.monotonic()
        self._from = step
        self._next = step + 1

    def is_due(self, step: int) -> bool:
        """Whether to save after `step`; asked after each, by all processes."""
        if not self._seconds or step < self._next:
            return False
        steps = distributed.on_primary(lambda: self._steps_left(step))
        self._next = step + steps
        return not steps

    def _steps_left(self, step: int) -> int:
        """How many steps to wait before the clock is asked again; 0: it is time."""
        passed = time.monotonic() - self._saved
        left = self._seconds - passed
        if left <= 0:
            return 0
        # Steps may become slower: this much is looked ahead of the time that is left.
        return max(int(_AHEAD * left / passed * (step - self._from)), 1)
