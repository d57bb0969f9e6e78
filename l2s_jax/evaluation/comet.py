"""COMET (Rei et al. 2020, arXiv 2009.09025) with a checkpoint in a folder, by the package of it."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from l2s_jax.data.templates import fields_of

_BATCH_SIZE = 16
_CHECKPOINT = os.path.join("checkpoints", "model.ckpt")


def check(folder: str) -> None:
    """Finds out whether there is all that COMET needs.

    Raises:
      ValueError: the folder is no checkpoint of COMET, or the package is missing.
    """
    key = f"config.evaluation.comet={folder!r}"
    for file in ("hparams.yaml", _CHECKPOINT):
        if not os.path.isfile(os.path.join(folder, file)):
            raise ValueError(f"{key}: expected a checkpoint of COMET, there is no {file} in it")
    if not importlib.util.find_spec("comet"):
        raise ValueError(f"{key}: expected the package unbabel-comet, which is not installed")


def sources_of(fields: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """What was translated: the text of the prompt's one field.

    Raises:
      ValueError: prompts have several fields.
    """
    if len(fields) != 1:
        raise ValueError(
            "config.evaluation.comet: expected one field in prompts, as the source that COMET "
            f"looks at, found {', '.join(fields)}"
        )
    return [fields_of(prompt) for prompt in prompts]


def scores(
    folder: str, sources: Sequence[str], predictions: Sequence[str], references: Sequence[str]
) -> list[float]:
    """100 times the score of each segment, with its source and one reference."""
    samples = [
        {"src": source, "mt": prediction, "ref": reference}
        for source, prediction, reference in zip(sources, predictions, references, strict=True)
    ]
    model, gpus = _loaded(folder)
    found = model.predict(samples, batch_size=_BATCH_SIZE, gpus=gpus, progress_bar=False).scores
    return [100.0 * float(score) for score in found]


@functools.lru_cache(maxsize=1)
def _loaded(folder: str) -> tuple[Any, int]:
    """(the model, how many GPUs it may use)."""
    comet: Any = importlib.import_module("comet")
    torch: Any = importlib.import_module("torch")
    path = os.path.join(folder, _CHECKPOINT)
    return comet.load_from_checkpoint(path), int(torch.cuda.is_available())
