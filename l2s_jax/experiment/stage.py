"""A stage of an experiment: what it is made from, how it is made and loaded, what is on disk."""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from l2s_jax.experiment.context import Context
from l2s_jax.experiment.workdir import (
    SHARED,
    Record,
    changes,
    fingerprint,
    holds,
    in_one_go,
    is_old,
    only_longer,
    rises_again,
    without,
)
from l2s_jax.files import plain

log = logging.getLogger(__name__)

# What version 0.1 recorded of a task.
_OLD_TASK = ("name", "source", "tfds_name", "splits", "prompt", "response", "references")


class Stage(abc.ABC):
    """One result, and what it is made from.

    Attributes:
      name: of the stage.
      needs: the stages that it is made from.
      is_by_prompt: whether it keeps something for each prompt. What it means to a stage that needs
        it, its own inputs say, whether or not anything is there.
    """

    is_by_prompt: bool = False

    def __init__(self, context: Context, name: str, *needs: Stage):
        self.context, self.name = context, name
        self.needs = tuple(dict.fromkeys(needs))

    def is_used(self) -> bool:
        """Whether the experiment has this stage."""
        return True

    @abc.abstractmethod
    def made(self) -> str:
        """The folder of the result, which is made if it is missing and may be."""

    @abc.abstractmethod
    def state(self) -> tuple[str, str]:
        """(done, begun, stale, missing or waiting; more about it): what is on disk, without JAX."""

    def known_by(self) -> Iterator[Stage]:
        """The stages whose results this one's inputs are read from."""
        for stage in self.needs:
            if stage.is_used():
                yield from stage.known_by() if stage.is_by_prompt else (stage,)


def undone(stages: Iterable[Stage]) -> list[str]:
    """Names of those that are used and not done, each once."""
    names = (stage.name for stage in stages if stage.is_used() and stage.state()[0] != "done")
    return list(dict.fromkeys(names))


class RecordedStage(Stage):
    """A stage in a folder of the workdir that bears its name and records its inputs.

    Attributes:
      version: of the code that makes it: higher where that gives another result of the same inputs.
      since: names of inputs that came after there were records. Work that was begun without one is
        no other work, and goes on as it was begun.
      unnamed: those of them by which a comparison does not name folders, as it did not before.
    """

    version: int = 1
    since: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()

    def __init__(self, context: Context, name: str, *needs: Stage, folder: str = ""):
        """`folder`: where the record is, if not in one of the stage's name."""
        super().__init__(context, name, *needs)
        self.record = Record(context.workdir, folder or name)

    @abc.abstractmethod
    def inputs(self) -> dict[str, Any]:
        """All that the result depends on, JSON-able; None where that is not known here."""

    def as_input(self) -> dict[str, Any]:
        """What the result means as an input of another stage: made of what, and by which code."""
        code = {"version": self.version} if self.version > 1 else {}
        return {**self.inputs(), **code}

    @abc.abstractmethod
    def is_made(self) -> bool:
        """Whether the result is on disk, whole; of whatever inputs."""

    @abc.abstractmethod
    def make(self) -> None:
        """Makes what is missing, in the stage's folder, which is `open`."""

    @abc.abstractmethod
    def progress(self) -> str:
        """How far it is, where it is begun and not made."""

    def sources(self) -> dict[str, str]:
        """The checkpoints' commits on the hub, which people want to know; not compared."""
        return self.context.sources()

    def old_inputs(self) -> dict[str, Any]:
        """Inputs that only version 0.1 recorded: settings of the task, in the place of its data."""
        task = self.context.config.task.to_dict()
        return {"task": {name: task[name] for name in _OLD_TASK}}

    def adopt(self) -> None:
        """Rewrites what version 0.1 left in the folder, where that is needed."""

    def reopen(self, steps: int) -> None:
        """Sets a result aside that is to be trained for longer than `steps`."""

    @functools.cache  # noqa: B019  it lives as long as its process
    def open(self) -> str:
        """The stage's folder, which holds only work on its inputs.

        Where something may be made: if it holds work on others, that is moved to NAME.old1, ...

        Raises:
          ValueError: nothing may be made, and there is no such stage, or it has other inputs.
        """
        if self.context.mode == "look":
            return self.record.directory
        from l2s_jax.cluster import distributed

        inputs = self.inputs()
        open_or_find = self._open if self.context.mode == "make" else self._find
        distributed.on_primary(lambda: open_or_find(inputs))
        return self.record.directory

    @functools.cache  # noqa: B019  one process may ask alone, once all have
    def made(self) -> str:
        """The stage's folder, with its result, which is made if it is missing.

        The processes of a job call it together, the first time.
        """
        directory = self.open()
        if self.context.mode == "look":
            return directory
        from l2s_jax.cluster import distributed

        if not distributed.on_primary(self.is_made):
            if self.context.mode == "find":
                raise ValueError(f"{directory}: not finished; --mode=train continues it")
            with self.telling():
                self.make()
        return directory

    @contextlib.contextmanager
    def telling(self, kind: str = "other", *, anew: bool = False) -> Iterator[None]:
        """Around what makes the stage: how long that took is kept, said, and told to trackers.

        `kind` and `anew` as `spent.on_stage` has them. Within itself it does nothing.
        """
        from l2s_jax.training import spent

        if spent.is_on(self.record.directory):
            yield
            return
        trackers = self.context.trackers
        trackers.stage(self.name)
        with spent.on_stage(self.record.directory, kind, anew=anew):
            yield
            seconds = spent.taken()
        log.info("stage %s took %s", self.name, spent.line(seconds))
        shares = spent.as_metrics(seconds)
        trackers.results({f"{self.name}/{name}": share for name, share in shares.items()})

    @functools.cache  # noqa: B019  stages that need this one ask too
    def state(self) -> tuple[str, str]:
        """(done, begun, stale, missing or waiting; more about it): what is on disk, without JAX."""
        found = self.record.read()
        if found is None:
            waits_for = undone(self.needs)
            return ("waiting", f"needs {', '.join(waits_for)}") if waits_for else ("missing", "")
        if waits_for := undone(self.known_by()):
            return "stale", f"needs {', '.join(waits_for)}"
        inputs = self.inputs()
        changed = self._changes(found, inputs)
        if only_longer(found, inputs, changed):
            return "begun", f"goes on from {found['train']['steps']} steps"
        if changed:
            return "stale", f"{', '.join(changed)} changed"
        return ("done", "") if self.is_made() else ("begun", self.progress())

    def _changes(self, found: dict[str, Any], inputs: dict[str, Any]) -> list[str]:
        return changes(found, self._as_begun(found, inputs), self.old_inputs(), self.version)

    def _as_begun(self, found: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs without those that were not there yet when a record was written."""
        return functools.reduce(
            lambda left, key: without(left, key) if not holds(found, key) else left,
            self.since,
            inputs,
        )

    def _share(self, inputs: dict[str, Any]) -> None:
        """Has the stage's folder be where all variants of a comparison have these inputs.

        That is a link to the comparison's own stage, if it has these inputs, else to
        SHARED/NAME-HASH.
        """

        def is_ours(record: Record) -> bool:
            found = record.read()
            if found is None or is_old(found) or self._changes(found, inputs):
                return False
            return in_one_go(found)

        if not self.record.is_link and is_ours(self.record):
            return
        name, root = os.path.basename(self.record.directory), self.context.shared
        own = Record(root, name)
        named = plain(functools.reduce(without, self.unnamed, inputs))
        digest = fingerprint({"stage": self.name, "version": self.version, "inputs": named})
        places = (
            Record(root, os.path.join(SHARED, f"{name}-{digest[:16]}{f'-{n}' if n else ''}"))
            for n in itertools.count()
        )
        # (One that was trained for longer by itself is no longer what its name says.)
        free = (place for place in places if place.read() is None or is_ours(place))
        self.record.link(own if is_ours(own) else next(free))

    def _open(self, inputs: dict[str, Any]) -> None:
        if self.context.shared:
            self._share(inputs)
        found = self.record.read()
        if found is None:
            self.record.write(inputs, self.version, self.sources())
            return
        changed, old = self._changes(found, inputs), is_old(found)
        extended: tuple[int, ...] = ()
        if changed and not only_longer(found, inputs, changed):
            log.info(
                "stage %s: %s changed; what was there is kept in %s",
                self.name,
                ", ".join(changed),
                self.record.move_aside(),
            )
        else:
            if changed:
                steps = found["train"]["steps"]
                log.info("stage %s: goes on from %d steps", self.name, steps)
                if rises_again(found):
                    log.warning(
                        "stage %s: with train.schedule='cosine' its learning rate, which falls to "
                        "zero at train.steps, rises again: the model is not that of %d steps in "
                        "one go",
                        *(self.name, inputs["train"]["steps"]),
                    )
                extended = (steps,)
                self.reopen(steps)
            if old:
                log.info(
                    "stage %s: of version 0.1, which did not record the content of its data; that "
                    "is taken to be the same",
                    self.name,
                )
                self.adopt()
            inputs = self._as_begun(found, inputs)
        if changed or old:
            self.record.write(inputs, self.version, self.sources(), extended)

    def _find(self, inputs: dict[str, Any]) -> None:
        directory = self.record.directory
        found = self.record.read()
        if found is None:
            raise ValueError(f"{directory}: no such stage; expected the workdir of a finished run")
        if changed := self._changes(found, inputs):
            raise ValueError(
                f"{directory}: made with other settings of {', '.join(changed)}; "
                "--mode=train makes it anew"
            )


def status(stages: Sequence[Stage]) -> str:
    """A line for each stage that is used: name, state, more about it, and what it is made from."""
    used = [stage for stage in stages if stage.is_used()]
    rows = []
    for stage in used:
        state, more = stage.state()
        needs = ", ".join(need.name for need in stage.needs if need.is_used())
        rows.append((stage.name, state, more, f"<- {needs}" if needs else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
