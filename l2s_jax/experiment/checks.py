"""Checks of a config: settings that no run could use are found before any work is done."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import distributed, sharding
from l2s_jax.config import check_prompts, naming_mesh, typed
from l2s_jax.experiment import feature_cache
from l2s_jax.settings import rules
from l2s_jax.settings.rules import SYSTEMS
from l2s_jax.training import trackers


@dataclasses.dataclass(frozen=True)
class Meshes:
    """The devices of a run, by what is done on them.

    features: of the LLM that fills the cache. decoding: of all that answers. labels: of the LLM
    that answers the train split or scores. Of the latter two those of one process, where each has
    whole copies of a model.
    """

    train: Mesh
    features: Mesh
    decoding: Mesh
    labels: Mesh

    def by_section(self) -> dict[str, Mesh]:
        """By the section that a mesh is set in; "" of that of training."""
        return {
            "": self.train,
            "features": self.features,
            "decoding": self.decoding,
            "labels": self.labels,
        }


def check_config(config: ConfigDict, meshes: Meshes) -> None:
    """Checks settings, one by one and beside each other; what data and models say comes later.

    Raises:
      ValueError: a setting that no run could use.
    """
    settings = typed(config)
    rules.check(settings)
    distributed.on_primary(lambda: trackers.check(settings.trackers))
    if settings.features.cache:
        feature_cache.check_folder(settings.features.cache)
    check_batches(config, meshes)


def check_examples(config: ConfigDict, examples: int) -> None:
    """Checks that the train split, of so many examples, fills the batches of all trainings.

    Raises:
      ValueError: it has fewer than one.
    """
    for name in SYSTEMS:
        if config[name].train.steps:
            check_batch(name, config[name].train, examples)


def check_batch(name: str, train: ConfigDict, examples: int) -> None:
    """As `check_examples`, of the training of one system."""
    if train.batch_size > examples:
        raise ValueError(
            f"config.{name}.train.batch_size is {train.batch_size}, expected at most {examples}, "
            "the examples of the train split"
        )


def check_batches(config: ConfigDict, meshes: Meshes) -> None:
    """Checks that the meshes split the batches of all stages that a run has, and the prompts.

    Raises:
      ValueError: a batch, or the length of a bucket, that one does not split.
    """
    settings = typed(config)
    batches = [
        ("decoding", settings.decoding.batch_size, "decoding"),
        ("slm.train", settings.slm.train.batch_size, ""),
        ("l2s.train", settings.l2s.train.batch_size, ""),
    ]
    if settings.llm.train.steps:
        batches.append(("llm.train", settings.llm.train.batch_size, ""))
    if settings.labels.source == "llm":
        batches.append(("labels", settings.labels.batch_size, "labels"))
    if settings.distillation.weight:
        batches.append(("distillation", settings.distillation.batch_size, "labels"))
    if settings.features.cache:
        # Prompts are encoded as they are trained on.
        batches.append(("l2s.train", settings.l2s.train.batch_size, "features"))
    by_section = meshes.by_section()
    for section, rows, where in batches:
        with naming_mesh(config, where):
            sharding.check_rows(rows, by_section[where], f"config.{section}.batch_size")
    for where in ("", *(where for _, _, where in batches)):
        with naming_mesh(config, where):
            check_prompts(config, by_section[where])
