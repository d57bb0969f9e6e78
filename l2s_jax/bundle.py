"""A trained L2S model on disk: config.json, params.safetensors (projector and SLM), tokenizers.

The LLM is not copied; config.json refers to its directory, by path and content hash. The SLM's
tokenizer lies beside the parameters, the LLM's in llm_tokenizer/ if it is another.
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
from l2s_jax.text import Tokenizer, load_tokenizer

_FAMILY = "l2s"
_LLM_TOKENIZER = "llm_tokenizer"


def _shapes(system: LlmToSlm) -> dict[str, tuple[int, ...]]:
    return param_shapes(jax.eval_shape(system.init, jax.random.key(0)))


def save(
    system: LlmToSlm,
    trained: Params,
    directory: str,
    *,
    llm_path: str,
    llm_hash: str,
    layer: float,
    llm_tokenizer: Tokenizer,
    slm_tokenizer: Tokenizer,
) -> None:
    """Writes projector, SLM and tokenizers.

    A relative `llm_path` is relative to the bundle's directory; `layer` is config.llm.layer.
    """
    fields = {
        "format": convert.FORMAT,
        "family": _FAMILY,
        "fusion": system.fusion,
        "projector_width": system.projector_width,
        "shared_vocabulary": system.shared_vocabulary,
        "slm": convert.config_to_native(system.slm_config),
        "llm": {"path": llm_path, "content_hash": llm_hash, "layer": layer},
    }
    shapes = _shapes(system)
    tensors = write_tensors(trained, own_entries(shapes), shapes)
    write_directory(directory, fields, tensors, "params")
    slm_tokenizer.save(directory)
    if not system.shared_vocabulary:
        llm_tokenizer.save(os.path.join(directory, _LLM_TOKENIZER))


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
        expected, layer = fields["llm"]["content_hash"], fields["llm"]["layer"]
        slm_config = convert.config_from_native(fields["slm"], path)
        slm_config = dataclasses.replace(slm_config, dtype=dtype)
        settings = {key: fields[key] for key in ("fusion", "projector_width", "shared_vocabulary")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the config of an L2S model: {error}") from None
    llm, frozen = convert.load_encoder(llm_path, layer=layer, dtype=dtype)
    if content_hash(llm_path) != expected:
        raise ValueError(
            f"{llm_path}: this LLM is not the one that {directory} was trained with "
            "(content hashes differ)"
        )
    system = LlmToSlm(llm.config, slm_config, **settings)
    shapes = _shapes(system)
    with TensorFiles(directory, "params") as files:
        return system, read_params(files, own_entries(shapes), shapes), frozen


def load_tokenizers(directory: str) -> tuple[Tokenizer, Tokenizer]:
    """(the prompts' tokenizer, the responses'), which are often the same."""
    own = load_tokenizer(directory)
    of_llm = os.path.join(directory, _LLM_TOKENIZER)
    return (load_tokenizer(of_llm) if os.path.isdir(of_llm) else own), own
