"""A trained L2S model on disk: config.json, params.safetensors (projector and SLM), tokenizer.

The LLM is not copied; config.json refers to its directory, by path and content hash.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax import convert
from l2s_jax.convert.engine import own_entries, param_shapes, read_params, write_tensors
from l2s_jax.convert.files import TensorFiles, content_hash, read_json, write_directory
from l2s_jax.models.systems import LlmToSlm, Params
from l2s_jax.models.t5 import T5Config

_FAMILY = "l2s"


def _shapes(system: LlmToSlm) -> dict[str, tuple[int, ...]]:
    return param_shapes(jax.eval_shape(system.init, jax.random.key(0)))


def save(
    system: LlmToSlm, trained: Params, directory: str, *, llm_path: str, llm_hash: str
) -> None:
    """Writes projector and SLM. A relative `llm_path` is relative to the bundle's directory."""
    slm = dataclasses.asdict(system.slm_config)
    del slm["dtype"]
    fields = {
        "format": convert.FORMAT,
        "family": _FAMILY,
        "fusion": system.fusion,
        "projector_width": system.projector_width,
        "slm": slm,
        "llm": {"path": llm_path, "content_hash": llm_hash},
    }
    shapes = _shapes(system)
    tensors = write_tensors(trained, own_entries(shapes), shapes)
    write_directory(directory, fields, tensors, "params")


def load(directory: str, *, dtype: Any = jnp.float32) -> tuple[LlmToSlm, Params, Params]:
    """(system, trained, frozen): what `save` wrote, and the part of the LLM that encodes.

    Raises:
      ValueError: no L2S model is there, or its LLM is gone or no longer the same.
    """
    path = os.path.join(directory, "config.json")
    fields = read_json(path)
    if fields.get("family") != _FAMILY:
        raise ValueError(f"{path}: family is {fields.get('family')!r}, expected {_FAMILY!r}")
    try:
        llm_path = os.path.normpath(os.path.join(directory, fields["llm"]["path"]))
        expected = fields["llm"]["content_hash"]
        slm_config = T5Config(**fields["slm"], dtype=dtype)
        fusion, projector_width = fields["fusion"], fields["projector_width"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config of an L2S model: {error}") from None
    llm, frozen = convert.load_encoder(llm_path, dtype=dtype)
    if content_hash(llm_path) != expected:
        raise ValueError(
            f"{llm_path}: this LLM is not the one that {directory} was trained with "
            "(content hashes differ)"
        )
    system = LlmToSlm(llm.config, slm_config, projector_width, fusion)
    shapes = _shapes(system)
    with TensorFiles(directory, "params") as files:
        return system, read_params(files, own_entries(shapes), shapes), frozen
