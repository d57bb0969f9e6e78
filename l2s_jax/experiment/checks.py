"""Checks of a config: settings that no run could use are found before any work is done."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import distributed, sharding
from l2s_jax.config import typed
from l2s_jax.experiment import feature_cache
from l2s_jax.settings import rules
from l2s_jax.training import trackers


def check_config(config: ConfigDict, mesh: Mesh, decoding_mesh: Mesh, label_mesh: Mesh) -> None:
    """Checks settings, one by one and beside each other; what data and models say comes later.

    Raises:
      ValueError: a setting that no run could use.
    """
    settings = typed(config)
    rules.check(settings)
    distributed.on_primary(lambda: trackers.check(settings.trackers))
    if settings.features.cache:
        feature_cache.check_folder(settings.features.cache)
    check_batches(config, mesh, decoding_mesh, label_mesh)


def check_batches(config: ConfigDict, mesh: Mesh, decoding_mesh: Mesh, label_mesh: Mesh) -> None:
    """Checks that the meshes split the batches of all stages that a run has.

    Raises:
      ValueError: a batch that one does not split.
    """
    settings = typed(config)
    batches = [
        ("decoding", settings.decoding.batch_size, decoding_mesh),
        ("slm.train", settings.slm.train.batch_size, mesh),
        ("l2s.train", settings.l2s.train.batch_size, mesh),
    ]
    if settings.llm.train.steps:
        batches.append(("llm.train", settings.llm.train.batch_size, mesh))
    if settings.labels.source == "llm":
        batches.append(("labels", settings.labels.batch_size, label_mesh))
    if settings.distillation.weight:
        batches.append(("distillation", settings.distillation.batch_size, label_mesh))
    for section, rows, split_over in batches:
        sharding.check_rows(rows, split_over, f"config.{section}.batch_size")
