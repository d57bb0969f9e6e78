"""What a training does about numbers that are not finite: steps that don't count, and its end."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

# A step is looked at when so many after it are on their way: the devices have work meanwhile, and
# all processes of a job look at the same steps.
_BEHIND = 4
_MOST_LISTED = 128


class NotFinite(FloatingPointError):
    """A run has failed by numbers that are not finite; in one line."""


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all floating-point numbers of a tree are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


class Watch:
    """Counts the steps whose loss or gradient was not finite, and ends a run that has too many.

    Attributes:
      skipped: how many there were since the training began.
    """

    def __init__(
        self,
        name: str,
        most: int,
        counted: Mapping[str, int],
        examples: Callable[[int], Iterable[int]] | None,
    ):
        """Nothing is looked at yet.

        Args:
          name: of the stage.
          most: such steps in a row that a run goes on after.
          counted: what `state` gave where this run goes on.
          examples: step -> the numbers of its examples.
        """
        self._name, self._most, self._examples = name, most, examples
        self.skipped, self._in_a_row = counted.get("skipped", 0), counted.get("in_a_row", 0)
        self._steps: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes note of a step that the devices have been given, and looks at an earlier one.

        `metrics`: as `update.train_step` gives them.

        Raises:
          NotFinite: too many steps in a row.
        """
        metrics["skipped"].copy_to_host_async()
        self._steps.append((step, metrics))
        self.look(step - _BEHIND)

    def look(self, last: int) -> None:
        """Looks at all steps up to `last`; waits for the devices where they are not done.

        Raises:
          NotFinite: too many steps in a row.
        """
        while self._steps and self._steps[0][0] <= last:
            step, metrics = self._steps.popleft()
            if not float(metrics["skipped"]):
                self._in_a_row = 0
                continue
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row > self._most:
                raise NotFinite(self._line(step, metrics))

    def check(self, step: int, what: str, is_finite: bool) -> None:
        """Raises a NotFinite where `what` of the model after a step is not finite."""
        if not is_finite:
            raise NotFinite(
                f"{self._name}: {what} not finite after step {step}, which is not saved; expected "
                "a lower learning rate"
            )

    def _line(self, step: int, metrics: Mapping[str, jax.Array]) -> str:
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        kinds = ("loss", "on_policy_loss", "divergence", "grad_norm")
        bad = {k: v for k in kinds if (v := values.get(k)) is not None and not math.isfinite(v)}
        found = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in bad.items())
        row = f", in {self._in_a_row} steps in a row" if self._in_a_row > 1 else ""
        return (
            f"{self._name}: step {step}: {found}{row}, at learning rate "
            f"{values['learning_rate']:g}{self._batch(step)}; expected a lower learning rate, "
            f"other data, or a max_bad_steps above {self._most}"
        )

    def _batch(self, step: int) -> str:
        if self._examples is None:
            return ""
        numbers = list(self._examples(step))
        listed = ", ".join(map(str, numbers[:_MOST_LISTED]))
        more = f" and {len(numbers) - _MOST_LISTED} more" if len(numbers) > _MOST_LISTED else ""
        return f", with the training examples {listed}{more} (counted from 0)"
