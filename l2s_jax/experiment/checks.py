"""Checks of a config: settings that no run could use are found before any work is done."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.decoding.search import Search
from l2s_jax.evaluation import metrics
from l2s_jax.experiment import features
from l2s_jax.models.l2s import FUSIONS
from l2s_jax.models.lora import check_lora
from l2s_jax.models.serving import WEIGHTS
from l2s_jax.training import loop


def check_config(config: ConfigDict, mesh: Mesh, decoding_mesh: Mesh) -> None:
    """Checks settings, one by one and beside each other; what data and models say comes later.

    Raises:
      ValueError: a setting that no run could use.
    """
    if config.features.cache:
        features.check_folder(config.features.cache)
    if config.labels not in ("data", "llm"):
        raise ValueError(f"config.labels={config.labels!r}: expected 'data' or 'llm'")
    if config.l2s.fusion not in FUSIONS:
        raise ValueError(f"config.l2s.fusion={config.l2s.fusion!r}: expected one of {FUSIONS}")
    if not config.llm.path and not config.llm.train.steps:
        raise ValueError(
            "config.llm: expected a path (a Hugging Face directory) or train.steps above 0"
        )
    if not config.llm.path and not config.tokenizer.train_vocab_size:
        raise ValueError(
            "config.tokenizer.train_vocab_size=0: expected a size, there is no config.llm.path to "
            "take a tokenizer from"
        )
    for split in ("train", "validation", config.evaluation.split):
        if split not in config.task.splits:
            raise ValueError(
                f"config.task.splits has {', '.join(config.task.splits)}: expected {split!r} too"
            )
    for name in config.evaluation.metrics:
        if name not in metrics.METRICS:
            raise ValueError(
                f"config.evaluation.metrics has {name!r}: expected some of {tuple(metrics.METRICS)}"
            )
    if config.decoding.max_new_tokens < 1 or config.decoding.batch_size < 1:
        raise ValueError(
            f"config.decoding: max_new_tokens={config.decoding.max_new_tokens}, "
            f"batch_size={config.decoding.batch_size}: expected positive numbers"
        )
    try:
        Search(**config.decoding.search.to_dict())
    except ValueError as error:
        raise ValueError(f"config.decoding.search.{error}") from None
    if config.decoding.weights not in WEIGHTS:
        raise ValueError(
            f"config.decoding.weights={config.decoding.weights!r}: expected one of {WEIGHTS}"
        )
    sharding.check_rows(config.decoding.batch_size, decoding_mesh, "config.decoding.batch_size")
    for name in ("llm", "slm", "l2s"):
        section = config[name].train
        if name == "llm" and not section.steps:
            continue
        loop.check_config(section, f"config.{name}.train")
        sharding.check_rows(section.batch_size, mesh, f"config.{name}.train.batch_size")
        if name != "llm" and config[name].lora.rank:
            _check_lora(config[name], f"config.{name}")


def _check_lora(section: ConfigDict, where: str) -> None:
    try:
        check_lora(**section.lora.to_dict())
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    if section.train.parameter_scale:
        raise ValueError(
            f"{where}.lora.rank={section.lora.rank} with {where}.train.parameter_scale=True: "
            "expected False, LoRA's matrices start at zero and updates relative to their size "
            "would be none"
        )
