"""Training checkpoints: Orbax, one item per part of the state.

Items: each top-level entry of the trained parameters ("projector", "slm" or "llm"), "opt" (step,
optimizer state), "average" (averaged parameters, where there are some), "data" (the data iterator's
state) and "config". Older versions kept the average within "opt", and are read too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from l2s_jax.checkpoints.files import listed
from l2s_jax.files import CannotWrite
from l2s_jax.messages import one_line
from l2s_jax.sealed import hash_of, with_hash, without_hash
from l2s_jax.training.checksums import checksums, different

# How many of the newest are kept, whatever they are worth.
NEWEST = 3
# In the config of a checkpoint: sums of its arrays, and the hash of its data.
_SUMS, _DATA = "sums", "data"
# Items; the average is one that older versions kept within the one before.
CONFIG, OPT, AVERAGE = "config", "opt", "average"
# How TensorStore says what the system said, and how Python does.
_SYSTEM_ERROR = re.compile(r"\[(?:os_error_code='|Errno )(\d+)'?\]")


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
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=keep or preservation_policy.AnyPreservationPolicy(policies),
            best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
            best_mode="max",
            # A folder that cannot be made in the background has all else wait for 20 minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=multiprocessing or ocp.options.MultiprocessingOptions(),
            create=multiprocessing is None,
        )
        os.makedirs(self._directory, exist_ok=True)
        with _readable(self._directory):
            self._manager = _Manager(self._directory, options=self._options)

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
        trees: Mapping[str, Any],
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        before: Callable[[], None] | None = None,
        again: bool = False,
    ) -> None:
        """Writes a checkpoint in the background; a kill leaves the ones before it whole.

        `trees` are its items of arrays by name. Without `metrics` it is not the best one, whatever
        the others are. `before` is for where the bucket's checkpoint must not be there before
        something else is. With `again`, it is in the place of the newest one, which is of the same
        step.

        Raises:
          CannotWrite: this one, or the one before it.
        """
        sums = checksums(trees)
        if again:
            with self._writing():
                self._manager.delete(step)
        self._write(step, sums, trees=trees, data=data, config=config, metrics=metrics)

    def _write(
        self,
        step: int,
        sums: Mapping[str, str],
        *,
        trees: Mapping[str, Any],
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """As of `save`, with the sums of the arrays."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        sums = {**sums, _DATA: hash_of(data)}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **items,
                    data=ocp.args.JsonSave(dict(data)),
                    config=ocp.args.JsonSave(with_hash({**config, _SUMS: sums})),
                ),
                metrics=dict(metrics) if metrics is not None else None,
            )

    def config(self, step: int) -> dict[str, Any]:
        """The config that `step` was saved with.

        Raises:
          ValueError: it cannot be read, or is not what was saved.
        """
        config, _ = self._config(step)
        return config

    def _config(self, step: int) -> tuple[dict[str, Any], dict[str, str] | None]:
        """(config, sums of the arrays or None where an older version saved none) of `step`."""
        where = self._place(step)
        with _readable(where):
            saved = self._saved_config(step)
            config = without_hash(saved, where, needed=_SUMS in saved)
        return config, config.pop(_SUMS, None)

    def _saved_config(self, step: int) -> dict[str, Any]:
        """The config of `step`, with all that lies beside it there."""
        restored: Any = self._manager.restore(
            step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
        )
        return restored.config

    def _place(self, step: int) -> str:
        return os.path.join(self._directory, str(step))

    def restore(self, step: int, trees: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """(trees, data) of `step`: items of arrays by name, placed as the abstract arrays given.

        Raises:
          ValueError: it cannot be read, or is not what was saved.
        """
        return self._restored(step, trees, data=ocp.args.JsonRestore())

    def restore_trees(self, step: int, trees: Mapping[str, Any]) -> dict[str, Any]:
        """As of `restore`, without the data: nothing is read but these trees."""
        return self._restored(step, trees)[0]

    def _restored(
        self, step: int, trees: Mapping[str, Any], **others: Any
    ) -> tuple[dict[str, Any], Any]:
        """(trees, data where `others` say how it is read) of `step`, compared with their sums."""
        where, (_, expected) = self._place(step), self._config(step)
        beside = os.path.isdir(os.path.join(self._directory, str(step), AVERAGE))
        stored = trees if beside or AVERAGE not in trees else _within_opt(trees)
        # Of an item that was not asked for, a part is read.
        items = {
            name: ocp.args.StandardRestore(tree) if name in trees else _part(tree)
            for name, tree in stored.items()
        }
        with _readable(where), contextlib.ExitStack() as stack:
            manager = self._manager
            if stored.keys() - trees:  # a manager reads an item always in the same way
                manager = stack.enter_context(_Manager(self._directory, options=self._options))
            restored: Any = manager.restore(step, args=ocp.args.Composite(**items, **others))
            found = {name: restored[name] for name in stored}
            if expected is not None:
                sums = checksums(found)
                if others:
                    sums[_DATA] = hash_of(restored.data)
                # A path begins with the name of its tree.
                began = tuple(f"['{name}']" for name in stored if name in trees)
                wanted = {n: s for n, s in expected.items() if n.startswith(began) or n in sums}
                if names := different(sums, wanted):
                    raise ValueError(f"damaged: other numbers than were saved in {listed(names)}")
        if stored is not trees:
            found[AVERAGE] = found[OPT].pop(AVERAGE)
        return {name: found[name] for name in trees}, restored.data if others else None


def _within_opt(trees: Mapping[str, Any]) -> dict[str, Any]:
    """Trees as older versions saved them: what "opt" has is in it, and the average too."""
    others = {name: tree for name, tree in trees.items() if name != AVERAGE}
    return {**others, OPT: {**trees.get(OPT, {}), AVERAGE: trees[AVERAGE]}}


def _part(tree: Any) -> ocp.args.PyTreeRestore:
    """How a tree is read that is a part of an item."""
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Has errors of Orbax, whatever their class, say in one line which checkpoint it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise
        said = one_line(error).removeprefix(f"{where}: ")
        raise ValueError(
            f"{where}: not readable: {said}; remove the folder, and the same command goes on from "
            "the checkpoint before"
        ) from None
