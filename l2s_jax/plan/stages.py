"""The stages of a whole run: which programs each has, how often, and on which devices.

As the stages of experiment/ make them, from the same sections of the config.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import label_tokens, naming_mesh, training_seed, tuned_l2s
from l2s_jax.data.tasks import load_task
from l2s_jax.experiment.checks import Meshes, check_batches
from l2s_jax.experiment.features import rows_of
from l2s_jax.plan import models
from l2s_jax.plan.models import Plan
from l2s_jax.plan.program import Program, Work
from l2s_jax.plan.programs import Compiler
from l2s_jax.plan.slices import Slice, alone

log = logging.getLogger(__name__)

_ANSWERING = ("encode", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    rows: examples at a time, of each of `groups` of devices that do different ones at once. times:
    how often each group runs each program; None where the number of examples is not known.
    """

    name: str
    mesh: Mesh
    rows: int
    groups: int
    times: Mapping[str, int | None]
    compile: Callable[[], dict[str, Program]]


class Training(NamedTuple):
    """A training of a run: its stage, as experiment/ calls it, its system, as `plan_of` does."""

    stage: str
    system: str
    work: Work


def trainings_of(config: ConfigDict) -> Iterator[Training]:
    """Those that the config has, in the order in which they are made."""
    tuned = bool(config.llm.tune.rank)
    if config.llm.train.steps:
        yield Training("llm", "llm", _training_work(config, "llm", config.llm.train))
    yield Training("slm", "slm", _training_work(config, "slm", config.slm.train))
    work = _training_work(config, "l2s", config.l2s.train)
    yield Training("l2s_frozen" if tuned else "l2s", "l2s", work)
    if tuned:
        work = _training_work(config, "l2s", tuned_l2s(config).train)
        yield Training("l2s", "tuned", dataclasses.replace(work, features=False))


def _training_work(config: ConfigDict, section: str, train: ConfigDict) -> Work:
    return Work(
        train,
        train_where=f"{section}.train",
        features=section == "l2s" and bool(config.features.cache),
        distilled=section != "llm" and bool(config.distillation.weight),
        seed=config.seed if section == "llm" else training_seed(config),
    )


def plan_of(l2s: Plan, config: ConfigDict, name: str) -> Plan:
    """That of a system: of the LLM or the SLM alone, of L2S, or of L2S with its LLM "tuned"."""
    if name in ("llm", "slm"):
        return models.alone(l2s, config, name)
    return models.tuned(l2s, config) if name == "tuned" else l2s


def meshes_of(config: ConfigDict, where: Slice, mesh: Mesh, make: Callable[..., Mesh]) -> Meshes:
    """The meshes of a run that trains on `mesh`; `make` gives that of a section.

    Raises:
      ValueError: one that does not fit the slice, or that does not split a batch of the run.
    """
    # Of the processes all have as many devices; what the first one has is what each has.
    decoding, labels = (
        alone(where, sharding.decoding_mesh(make(config, where, section)))
        for section in ("decoding", "labels")
    )
    found = Meshes(mesh, make(config, where, "features"), decoding, labels)
    check_batches(config, found)
    return found


def examples_of(config: ConfigDict, split: str) -> int | None:
    """Examples of a split whose files are at hand; None of what is elsewhere or cannot be read."""
    try:
        task = load_task(config.task)
        return len(task.examples(split)) if task.files(split, prepare=False) else None
    except (ImportError, OSError, ValueError) as error:
        log.info("the %s split is not counted: %s", split, error)
        return None


class Run:
    """A whole run of a config on a slice.

    Attributes:
      examples: of the splits train and validation and of those that the report is about
        ("evaluation"); None where that is not known.
    """

    def __init__(
        self, plan: Plan, config: ConfigDict, where: Slice, meshes: Meshes, examples: int | None
    ):
        """`examples` are those of the train split, if it is not to be read.

        Raises:
          ValueError: a mesh that does not divide the LLM.
        """
        holding = {"features": meshes.features, "decoding": meshes.decoding}
        if config.labels.source == "llm" or config.distillation.weight:
            holding["labels"] = meshes.labels
        for section, mesh in holding.items():
            with naming_mesh(config, section):
                sharding.parameter_shardings(plan.frozen, mesh)
        self._l2s, self._config, self._where, self._meshes = plan, config, where, meshes
        settings = config.evaluation
        train = examples if examples is not None else examples_of(config, "train")
        self.examples = {
            "train": train,
            "validation": self._first("validation", settings.validation_examples, train),
            "evaluation": self._first(settings.split, settings.max_examples, train),
        }

    def _first(self, split: str, limit: int, train: int | None) -> int | None:
        """Of a split's examples at most `limit`; where there is no telling, as many as that."""
        known = train if split == "train" else examples_of(self._config, split)
        if known is None:
            return limit or None
        return min(limit, known) if limit else known

    def stages(self) -> Iterator[Stage]:
        """Those that the config has, in the order in which they are made."""
        config = self._config
        trainings = {one.stage: one for one in trainings_of(config)}
        if "llm" in trainings:
            yield self._training("llm", trainings["llm"])
        if config.labels.source == "llm":
            section = config.labels
            search = section.search.to_dict()
            work = self._work(section, "labels", label_tokens(config), search)
            yield self._answering("labels", "llm", work, ("train", "validation"))
        if config.distillation.weight:
            work = Work(batch_size=config.distillation.batch_size, decoding_where="distillation")
            compiler = functools.partial(self._compiler, "llm", self._meshes.labels, work)
            yield self._pass("logits", "score", work, ("train",), lambda: compiler().score())
        yield self._training("slm", trainings["slm"])
        if config.features.cache:
            mesh = self._meshes.features
            rows = rows_of(config.l2s.train, sharding.batch_ways(mesh))
            work = Work(batch_size=rows, decoding_where="l2s.train")
            compiler = functools.partial(self._compiler, "l2s", mesh, work)
            yield self._pass(
                "features",
                "encode",
                work,
                ("train", "validation"),
                lambda: compiler().encode_for_cache(),
                mesh,
            )
        if config.llm.tune.rank:
            yield self._training("l2s", trainings["l2s_frozen"])
            yield self._training("l2s tuned", trainings["l2s"])
        else:
            yield self._training("l2s", trainings["l2s"])
        for name in ("llm", "slm", "l2s", "l2s_mismatched"):
            section = config.decoding
            search = section.search.to_dict()
            work = self._work(section, "decoding", section.max_new_tokens, search)
            system = name.removesuffix("_mismatched")
            yield self._answering(f"evaluation: {name}", system, work, ("evaluation",))

    @staticmethod
    def _work(section: ConfigDict, where: str, tokens: int, search: Mapping[str, Any]) -> Work:
        return Work(None, section.batch_size, tokens, search, decoding_where=where)

    @functools.cache  # noqa: B019  a plan lives as long as its process
    def _plan(self, name: str) -> Plan:
        return plan_of(self._l2s, self._config, name)

    def _compiler(self, name: str, mesh: Mesh, work: Work) -> Compiler:
        return Compiler(self._plan(name), self._config, self._where, mesh, work)

    def _training(self, stage: str, training: Training) -> Stage:
        mesh, work = self._meshes.train, training.work
        assert work.train is not None
        return Stage(
            stage,
            mesh,
            work.train.batch_size,
            1,
            {"train": work.train.steps},
            lambda: dict(self._compiler(training.system, mesh, work).compile(("train",))),
        )

    def _answering(self, stage: str, name: str, work: Work, splits: tuple[str, ...]) -> Stage:
        mesh = self._meshes.labels if stage == "labels" else self._meshes.decoding
        times = self._batches(work, mesh, splits)
        more = None if times is None else times * (work.max_new_tokens - 1)
        return Stage(
            stage,
            mesh,
            work.batch_size,
            self._groups(mesh),
            {"encode": times, "prefill": times, "decode": more},
            lambda: self._answers(name, mesh, work),
        )

    def _answers(self, name: str, mesh: Mesh, work: Work) -> dict[str, Program]:
        """The programs that answer; those that another stage has too are compiled once."""
        search = tuple(sorted(work.search.items()))
        key = (name, mesh, work.batch_size, work.max_new_tokens, search)
        if key not in self._compiled:
            self._compiled[key] = dict(self._compiler(name, mesh, work).compile(_ANSWERING))
        return self._compiled[key]

    @functools.cached_property
    def _compiled(self) -> dict[Any, dict[str, Program]]:
        return {}

    def _pass(
        self,
        stage: str,
        program: str,
        work: Work,
        splits: tuple[str, ...],
        compile_it: Callable[[], Program],
        mesh: Mesh | None = None,
    ) -> Stage:
        """Once over the examples, on the mesh of labels if on no other."""
        mesh = mesh or self._meshes.labels
        times = self._batches(work, mesh, splits)
        return Stage(
            stage,
            mesh,
            work.batch_size,
            self._groups(mesh),
            {program: times},
            lambda: {program: compile_it()},
        )

    def _groups(self, mesh: Mesh) -> int:
        return len(self._where.devices) // mesh.size

    def _batches(self, work: Work, mesh: Mesh, splits: tuple[str, ...]) -> int | None:
        """Batches of each group of devices, over all examples of these splits."""
        total = 0
        for split in splits:
            examples = self.examples[split]
            if examples is None:
                return None
            total += -(-examples // (work.batch_size * self._groups(mesh)))
        return total
