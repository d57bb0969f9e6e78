"""The stages of a whole run: which programs each has, how often, and on which devices.

As the stages of experiment/ make them, from the same sections of the config.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import label_tokens, training_seed, tuned_l2s
from l2s_jax.data.tasks import load_task
from l2s_jax.experiment.checks import Meshes, check_batches
from l2s_jax.plan.program import Program, Work
from l2s_jax.plan.programs import Compiler, Compilers
from l2s_jax.plan.slices import Slice, alone
from l2s_jax.serving.programs import sizes_of
from l2s_jax.serving.refilled import WORTHWHILE, can_refill, rows_for
from l2s_jax.settings import search
from l2s_jax.training.parts import rows_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    rows: examples at a time, of each of `groups` of devices that do different ones at once. times:
    how often each group runs each program of `compiler`; None where the number of examples is not
    known.
    """

    name: str
    compiler: Compiler
    rows: int
    groups: int
    times: Mapping[str, int | None]

    @property
    def mesh(self) -> Mesh:
        """Of one of the groups."""
        return self.compiler.mesh

    def compile(self) -> dict[str, Program]:
        """The programs, by name."""
        return dict(self.compiler.compile(self.times))


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


def answering(section: ConfigDict, where: str, tokens: int) -> Work:
    """Of a system that answers as a section, config.`where`, says: with so many tokens at most."""
    return Work(None, section.batch_size, tokens, section.search.to_dict(), decoding_where=where)


def labelling(config: ConfigDict) -> Work:
    """Likewise, of the LLM for the labels."""
    return answering(config.labels, "labels", label_tokens(config))


def answering_to_evaluate(config: ConfigDict) -> Work:
    """Likewise, of each system for the report."""
    return answering(config.decoding, "decoding", config.decoding.max_new_tokens)


def longest(config: ConfigDict) -> int:
    """The most tokens that any response which a model of the run writes may have."""
    tokens = config.decoding.max_new_tokens
    return max(tokens, label_tokens(config)) if config.labels.source == "llm" else tokens


def meshes_of(config: ConfigDict, where: Slice, mesh: Mesh, make: Callable[..., Mesh]) -> Meshes:
    """The meshes of a run that trains on `mesh`; `make` gives that of a section.

    Raises:
      ValueError: one that does not fit the slice, or that does not split a batch of the run.
    """
    decoding, labels = (
        answering_mesh(where, make(config, where, section)) for section in ("decoding", "labels")
    )
    found = Meshes(mesh, make(config, where, "features"), decoding, labels)
    check_batches(config, found)
    return found


def answering_mesh(where: Slice, mesh: Mesh) -> Mesh:
    """Of a process of a job that answers on `mesh`: all have as many devices as the first."""
    return alone(where, sharding.decoding_mesh(mesh))


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
      response_tokens: of a response that a model writes, on average; None: as many as it may have.
    """

    def __init__(
        self,
        compilers: Compilers,
        meshes: Meshes,
        examples: int | None = None,
        response_tokens: float | None = None,
    ):
        """`examples` are those of the train split, if it is not to be read."""
        self.response_tokens = response_tokens
        self._compilers, self._meshes = compilers, meshes
        self._config = config = compilers.config
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
        """Those that the config has, in the order in which they are made.

        Raises:
          ValueError: a model, a batch or a length that a mesh does not divide.
        """
        config, meshes = self._config, self._meshes
        trainings = {one.stage: one for one in trainings_of(config)}
        learnt = ("train", "validation")
        if "llm" in trainings:
            yield self._training("llm", trainings["llm"])
        if config.labels.source == "llm":
            own = self._own(learnt, meshes.labels)
            yield self._answering("labels", "llm", meshes.labels, labelling(config), own)
        if config.distillation.weight:
            work = Work(batch_size=config.distillation.batch_size, decoding_where="distillation")
            yield self._pass("logits", "llm", meshes.labels, "score", work, learnt[:1])
        yield self._training("slm", trainings["slm"])
        if config.features.cache:
            rows = rows_of(config.l2s.train, sharding.batch_ways(meshes.features))
            work = Work(batch_size=rows, decoding_where="l2s.train")
            yield self._pass("features", "l2s", meshes.features, "encode_for_cache", work, learnt)
        if config.llm.tune.rank:
            yield self._training("l2s", trainings["l2s_frozen"])
            yield self._training("l2s tuned", trainings["l2s"])
        else:
            yield self._training("l2s", trainings["l2s"])
        own = self._own(["evaluation"], meshes.decoding)
        answers = (meshes.decoding, answering_to_evaluate(config), own)
        for name in ("llm", "slm", "l2s"):
            yield self._answering(f"evaluation: {name}", name, *answers, WORTHWHILE)
        yield self._in_batches("evaluation: l2s_mismatched", "l2s", *answers)

    def labels_of_all_rows(self, mesh: Mesh, rows: int) -> tuple[Stage, float]:
        """Labels on a mesh, of as many prompts as it has rows; how many tokens they have."""
        work = dataclasses.replace(labelling(self._config), batch_size=rows)
        stage = self._answering("labels", "llm", mesh, work, [rows])
        return stage, stage.groups * rows * self._tokens_of(work)

    def _training(self, stage: str, training: Training) -> Stage:
        work = training.work
        assert work.train is not None
        compiler = self._compilers.of(training.system, self._meshes.train, work)
        return Stage(stage, compiler, work.train.batch_size, 1, {"train": work.train.steps})

    def _answering(
        self,
        stage: str,
        system: str,
        mesh: Mesh,
        work: Work,
        own: Sequence[int | None],
        fewest_batches: int = 0,
    ) -> Stage:
        """Answers to prompts of several splits, of which each group has `own`.

        In rows that are refilled. In batches where a run does so: fewer prompts of the first split
        than so many batches, and some searches.
        """
        first = own[0]
        few = first is not None and first < fewest_batches * work.batch_size
        if few or not can_refill(search.alone(work.search)):
            return self._in_batches(stage, system, mesh, work, own)
        sizes = sizes_of(work.batch_size, sharding.batch_ways(mesh))
        rows, together = rows_for(sizes[-1] if first is None else max(first, 1), sizes)
        work = dataclasses.replace(work, batch_size=rows, together=together)
        compiler, more = self._compilers.of(system, mesh, work), self._tokens_of(work) - 1
        reads = steps = None
        known = [count for count in own if count is not None]
        if len(known) == len(own):
            reads = sum(-(-count // together) for count in known)
            steps = sum(math.ceil(-(-count // rows) * more) for count in known)
        times = {"read": reads, "insert": reads, "advance": steps}
        return Stage(stage, compiler, rows, self._groups(mesh), times)

    def _in_batches(
        self, stage: str, system: str, mesh: Mesh, work: Work, own: Sequence[int | None]
    ) -> Stage:
        compiler = self._compilers.of(system, mesh, work)
        batches = _batches(work, own)
        steps = None if batches is None else math.ceil(batches * (self._tokens_of(work) - 1))
        times = {"encode": batches, "prefill": batches, "decode": steps}
        return Stage(stage, compiler, work.batch_size, self._groups(mesh), times)

    def _tokens_of(self, work: Work) -> float:
        """Of a response: on average, or of one that is as long as it may be."""
        return min(self.response_tokens or math.inf, work.max_new_tokens)

    def _pass(
        self, stage: str, system: str, mesh: Mesh, program: str, work: Work, splits: tuple[str, ...]
    ) -> Stage:
        """Once over the examples."""
        compiler = self._compilers.of(system, mesh, work)
        times = {program: _batches(work, self._own(splits, mesh))}
        return Stage(stage, compiler, work.batch_size, self._groups(mesh), times)

    def _groups(self, mesh: Mesh) -> int:
        return len(self._compilers.slice.devices) // mesh.size

    def _own(self, splits: Iterable[str], mesh: Mesh) -> list[int | None]:
        """Examples of each split that each group of devices has."""
        counts = (self.examples[split] for split in splits)
        return [None if count is None else -(-count // self._groups(mesh)) for count in counts]


def _batches(work: Work, own: Sequence[int | None]) -> int | None:
    """Batches of a group of devices that has so many examples of each split."""
    known = [count for count in own if count is not None]
    if len(known) < len(own):
        return None
    return sum(-(-count // work.batch_size) for count in known)
