"""Training checkpoints: Orbax, one item per part of the state.

Items: each top-level entry of the trained parameters ("projector", "slm" or "llm"), "opt" (step,
optimizer state, averaged parameters), "data" (the data iterator's state) and "config".
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from l2s_jax.files import CannotWrite, one_line

# How many of the newest are kept, whatever they are worth.
NEWEST = 3
# How TensorStore says what the system said.
_SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")


class _Manager(ocp.CheckpointManager):
    """One that leaves signals to stopping.py.

    It would ask JAX by numbers of its own, also from a thread, and the answers there would differ.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        return False


class Checkpoints:
    """The newest checkpoints of a run, to resume from, and the best one, to keep.

    A context manager: leaving it waits for the last write.
    """

    def __init__(
        self,
        directory: str,
        *,
        best_metric: str | None,
        keep: Any = None,
        multiprocessing: ocp.options.MultiprocessingOptions | None = None,
    ) -> None:
        """`best_metric`: which of the metrics given to `save` ranks checkpoints, higher is better;
        None: the latest is the best. `keep`: a policy in the place of the newest and the best.
        `multiprocessing`: how processes share the work, if not as on a disk that all see.
        """
        policies: list[Any] = [preservation_policy.LatestN(NEWEST)]
        if best_metric:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best_metric = best_metric
        self._directory = os.path.abspath(directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep or preservation_policy.AnyPreservationPolicy(policies),
            best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
            best_mode="max",
            # A folder that cannot be made in the background has all else wait for 20 minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=multiprocessing or ocp.options.MultiprocessingOptions(),
            create=multiprocessing is None,
        )
        self._manager = _Manager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object = None, error: object = None, _: object = None) -> None:
        if error is None:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.close()
        # Of several processes, the one that failed would wait for the others, who wait for it. What
        # could not be written would be waited for, too.
        elif jax.process_count() == 1 and not isinstance(error, CannotWrite):
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what fails when something could not be written, now or in the background."""
        try:
            yield
        except Exception as error:
            found = _SYSTEM_ERROR.search(str(error))
            reason = os.strerror(int(found[1])) if found else one_line(error)
            raise CannotWrite(f"{self._directory}: a checkpoint cannot be written: {reason}") from (
                error
            )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint to keep; waits for the one that is being written."""
        self.wait()
        return self._manager.best_step() if self._best_metric else self.latest_step

    def wait(self) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
          CannotWrite: it could not be.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def save(
        self,
        step: int,
        *,
        params: Mapping[str, Any],
        opt: Any,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Writes a checkpoint in the background; a kill leaves the ones before it whole.

        Without `metrics` it is not the best one, whatever the others are. `before` is for where the
        bucket's checkpoint must not be there before something else is.

        Raises:
          CannotWrite: this one, or the one before it.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in params.items()}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **items,
                    opt=ocp.args.StandardSave(opt),
                    data=ocp.args.JsonSave(dict(data)),
                    config=ocp.args.JsonSave(dict(config)),
                ),
                metrics=dict(metrics) if metrics is not None else None,
            )

    def config(self, step: int) -> dict[str, Any]:
        """The config that `step` was saved with."""
        restored: Any = self._manager.restore(
            step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
        )
        return restored.config

    def restore(
        self, step: int, *, params: Mapping[str, Any], opt: Any
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """(params, opt, data) of `step`, placed as the abstract arrays given."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in params.items()}
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **items, opt=ocp.args.StandardRestore(opt), data=ocp.args.JsonRestore()
            ),
        )
        return {name: restored[name] for name in params}, restored.opt, restored.data
