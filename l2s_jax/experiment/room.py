"""Whether the models of a comparison have room on the disk, found before the first is trained."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Any

import jax
from ml_collections import ConfigDict

from l2s_jax.experiment.early import models_of
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.grid import Grid
from l2s_jax.experiment.workdir import in_one_go
from l2s_jax.files import is_bucket
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.mix import hidden_width
from l2s_jax.models.systems import LanguageModel, parameter_count
from l2s_jax.training.checkpoint import NEWEST

_FLOAT32 = 4
# Settings that a model of a stage does not depend on.
_ELSEWHERE = ("decoding", "evaluation", "mesh", "features", "dtype", "scan_layers", "buckets")
_NOT_OF = {
    "llm": ("slm", "l2s", "labels", "distillation", "train_seed"),
    "slm": ("l2s",),
    "l2s": (),
}


def check_room(grid: Grid, workdir: str) -> None:
    """Checks that the disk has room for the models, and their checkpoints, that are to be made.

    It is an estimate, of models and checkpoints alone.

    Raises:
      ValueError: they need more than is free.
    """
    if is_bucket(workdir):
        return
    needed: dict[str, int] = {}
    own = os.path.exists(os.path.join(workdir, "config.json"))
    for variant in grid.variants:
        folders = [grid.directory(workdir, variant), *([workdir] if own else [])]
        looks = [Experiment(variant.config, folder, "look") for folder in folders]
        found = sizes(variant.config)
        for name, size in found.items():
            if any(_is_done(look, name) for look in looks):
                continue
            needed[_key(variant.config, name)] = size
    missing = sum(needed.values())
    free = shutil.disk_usage(workdir).free
    if missing > free:
        raise ValueError(
            f"{workdir}: {len(needed)} models are to be made, which need about "
            f"{_gigabytes(missing)} with their checkpoints; {_gigabytes(free)} are free there"
        )


def _is_done(look: Experiment, name: str) -> bool:
    (stage,) = (stage for stage in look.systems if stage.name == name)
    return stage.state()[0] == "done" and in_one_go(stage.record.read() or {})


def sizes(config: ConfigDict) -> dict[str, int]:
    """Bytes of the model and the checkpoints of each stage that trains."""
    models = models_of(config)
    llm, slm = models["llm"], models["slm"]
    pieces = {"llm": config.tokenizer.train_vocab_size}
    pieces["slm"] = config.slm.tokenizer.train_vocab_size or pieces["llm"]
    alone = _parameters(slm, pieces["slm"])
    width = config.l2s.projector_width or slm.width
    projector = width * (slm.width + hidden_width(llm, config.l2s.layers))
    found = {}
    if config.llm.train.steps:
        found["llm"] = _parameters(llm, pieces["llm"]) * _copies(config.llm)
    found["slm"] = alone * _copies(config.slm)
    found["l2s"] = (alone + projector) * _copies(config.l2s)
    return found


def _parameters(model: ModelConfig, pieces: int) -> int:
    """Of a model with so many pieces, or as many as it has."""
    config: Any = model
    if pieces > config.vocab_size:
        config = dataclasses.replace(config, vocab_size=pieces)
    init = LanguageModel("slm", config).init
    return parameter_count(jax.eval_shape(init, jax.random.key(0)))


def _copies(section: ConfigDict) -> int:
    """Bytes on the disk for each parameter: the model, the newest checkpoints and the best one."""
    train = section.train
    lora = "lora" in section and section.lora.rank
    checkpoint = 1 + (2 if train.optimizer == "adamw" else 0) + (1 if train.ema_decay else 0)
    kept = min(NEWEST + (train.select != "last"), -(-train.steps // train.evaluate_every))
    return _FLOAT32 * (1 + (0 if lora else checkpoint * kept))


def _key(config: ConfigDict, name: str) -> str:
    """The same for variants that share the stage."""
    values = config.to_dict()
    for section in (*_ELSEWHERE, *_NOT_OF[name]):
        values.pop(section, None)
    if name == "l2s":
        values["slm"] = {k: v for k, v in values["slm"].items() if k not in ("train", "lora")}
    return json.dumps([name, values], sort_keys=True)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
